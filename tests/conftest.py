"""Here so that pytest finds what tests import: the packages unit, e2e, lab and programs are beside it."""
