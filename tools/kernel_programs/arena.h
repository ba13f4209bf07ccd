/* Memory whose ends are exact: a region ends, or starts, at a page that cannot be accessed, and everything around it in
 * its own pages is a red zone of bytes that are NaN in every number format. AddressSanitizer knows the exact ends too. */
#ifndef KERNEL_PROGRAMS_ARENA_H
#define KERNEL_PROGRAMS_ARENA_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define HAS_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_ADDRESS_SANITIZER
#endif
#endif

#ifdef HAS_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#endif

enum { PAGE = 4096, ZONE = 512, FILL = 0xff, MAX_SLOTS = 160 };
enum { AT_END, AT_START, INSIDE };

/* Pages between two that cannot be accessed. */
typedef struct {
    uint8_t *pages, *start; /* start: of the region */
    size_t room, size;      /* bytes of the pages, and of the region */
} Slot;

static inline void fail(const char *what, long number) {
    fprintf(stderr, "driver: %s (%ld)\n", what, number);
    _Exit(3);
}

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Bytes of the red zones before and after the region of a slot. */
static inline size_t before(const Slot *s) { return smaller((size_t)(s->start - s->pages), ZONE); }
static inline size_t after(const Slot *s) {
    return smaller((size_t)(s->pages + s->room - s->start) - s->size, ZONE);
}

static inline void make_room(Slot *s, size_t room) {
    room = (room + PAGE - 1) / PAGE * PAGE;
    if (s->pages && s->room >= room)
        return;
    if (s->pages) {
        ASAN_UNPOISON_MEMORY_REGION(s->pages, s->room);
        munmap(s->pages - PAGE, s->room + 2 * PAGE);
    }
    uint8_t *all = mmap(0, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + PAGE, room, PROT_READ | PROT_WRITE))
        fail("no memory for a region", (long)room);
    *s = (Slot){.pages = all + PAGE, .room = room};
    ASAN_POISON_MEMORY_REGION(s->pages, s->room);
}

/* Places a region of `size` bytes in a slot, and fills it and its red zones. skew: bytes before it if it is INSIDE. */
static inline void place(Slot *s, size_t size, int where, size_t skew) {
    make_room(s, size + (where == INSIDE ? skew + ZONE : 1));
    s->size = size;
    s->start = where == AT_END ? s->pages + s->room - size : s->pages + (where == INSIDE ? skew : 0);
    ASAN_UNPOISON_MEMORY_REGION(s->start - before(s), before(s) + size + after(s));
    memset(s->start - before(s), FILL, before(s) + size + after(s));
    ASAN_POISON_MEMORY_REGION(s->start - before(s), before(s));
    ASAN_POISON_MEMORY_REGION(s->start + size, after(s));
}

static inline int is_filled(const uint8_t *from, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (from[i] != FILL)
            return 0;
    return 1;
}

/* Returns whether nobody has written to the red zones of a slot; poisons all of it. */
static inline int release(Slot *s) {
    ASAN_UNPOISON_MEMORY_REGION(s->start - before(s), before(s) + s->size + after(s));
    int found = is_filled(s->start - before(s), before(s)) && is_filled(s->start + s->size, after(s));
    ASAN_POISON_MEMORY_REGION(s->pages, s->room);
    return found;
}

/* Prints which slot, if any, an address is close to. */
static inline void explain(const Slot *slots, long count, const char *what, const uint8_t *at) {
    for (long i = 0; i < count; i++)
        if (slots[i].pages && at >= slots[i].pages - PAGE && at < slots[i].pages + slots[i].room + PAGE)
            fprintf(stderr, "driver: access at byte %ld of the %zu of %s %ld\n", (long)(at - slots[i].start),
                    slots[i].size, what, i);
}

#endif
