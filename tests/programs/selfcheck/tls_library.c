/* A library of its own: its thread-local variable is reached by __tls_get_addr, as that of any plugin is. */
#include <stdint.h>

static __thread uint64_t slots[4] = {11, 22, 33, 44};

uint64_t *tls_library_slots(void)
{
    return slots;
}
