"""Hosts made of namespaces: several separate Linux hosts on one machine, for people and for tests."""
