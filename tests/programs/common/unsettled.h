/* A thread that changes the process's address space all the time, a little at a time, and checks what is there. */
#pragma once

#include <stddef.h>

/* It maps, drops and unmaps pages, keeps guard pages, and maps the first page of one of `files` after another, all in
 * a room of its own. `open_file`, if not NULL, is kept open and read again and again. Counter "turns". */
void unsettled_start(const char *const *files, size_t count, const char *open_file);
