/* Shared by attention of one token at a time (attention.c) and of several together (attend_many.c). */
#ifndef STREAMCHAT_ATTENTION_H
#define STREAMCHAT_ATTENTION_H

#include "operations.h"

#define LOWEST -1e30f

/* MAX_QUERIES: queries of one token that read a key together. */
enum { MAX_DIM = 256, MAX_QUERIES = 16 };

INLINE int has_scales(int format) { return format >= INT8; }

/* Bytes of `dim` numbers of a head, without the scale. */
INLINE long head_bytes(int format, int dim) {
    if (has_scales(format))
        return format == INT8 ? dim : dim / 2;
    return (long)dim * (format == FLOAT32 ? 4 : 2);
}

INLINE int key_format(int format) { return format == K8V4 ? INT8 : format; }

INLINE int value_format(int format) { return format == K8V4 ? INT4 : format; }

/* The scale at an index; NULL if the format has no scales. */
INLINE uint16_t *scale_at(uint16_t *scales, long index) { return scales ? scales + index : 0; }

/* The key of slot `slot` of a head. */
INLINE char *key_at(const Attention *a, int h, long slot) {
    return a->keys + h * a->head_stride_bytes + slot * head_bytes(key_format(a->format), a->head_dim);
}

/* The value of that slot. */
INLINE char *value_at(const Attention *a, int h, long slot) {
    long each = head_bytes(value_format(a->format), a->head_dim);
    long slots = a->head_stride_bytes / head_bytes(key_format(a->format), a->head_dim);
    return a->values + (h * slots + slot) * each;
}

/* First slot that a new token reads. */
INLINE long first_slot(const Attention *a, int token) {
    long stop = a->cached + token + 1;
    return a->window && stop > a->window ? stop - a->window : 0;
}

/* Normalizes, rotates and scales a token's query head `i` of those that share the key head `h`. */
void prepare_query(const Attention *a, int token, int h, int i, float *out);
/* Maxima and sums of the partial results: (token, head, span, query). */
float *attention_tops(const Attention *a);
float *attention_sums(const Attention *a);

/* Codes of neighboring slots of a head, and their scales. */
typedef struct {
    const char *codes;
    const uint16_t *scales;
} Codes;

/* Attention of turned queries to codes of a format with scales; the results are those of `span`, turned. */
void span_codes(const Codes *keys, const Codes *values, int format, long count, const float *query, int queries, int dim,
                float cap, float *top, float *sum, float *acc);

/* Whether several tokens attend together: enough of them to be worth it. */
int is_many(const Attention *a);
int attend_many_tasks(const Attention *a);
long attend_many_memory(void);
void attend_many_work(const Attention *a, int task, float *memory);

#endif
