/* Mixtures of experts: only the chosen experts are computed, and tokens that chose the same expert share the reading of
 * its weights. */
#include "products.h"

static long least(long a, long b) { return a < b ? a : b; }

/* Chooses experts that are not chosen yet, from choice `c` on. */
static void choose_any(const Experts *e, int c, int32_t *chosen) {
    for (int i = 0; c < e->top_k; i++) {
        int is_left = 1;
        for (int k = 0; k < c; k++)
            is_left &= chosen[k] != i;
        if (is_left)
            chosen[c++] = i;
    }
}

/* Chooses the experts with the largest logits, and among equal ones the first. They are valid and all different for NaN
 * too. */
static void choose(const Experts *e, const float *logits, int32_t *chosen) {
    for (int c = 0; c < e->top_k; c++) {
        int best = -1, last = c ? chosen[c - 1] : -1;
        for (int i = 0; i < e->num_experts; i++) {
            int is_left = last < 0 || logits[i] < logits[last] || (logits[i] == logits[last] && i > last);
            if (is_left && (best < 0 || logits[i] > logits[best]))
                best = i;
        }
        if (best < 0) {
            choose_any(e, c, chosen);
            return;
        }
        chosen[c] = best;
    }
}

static void share(const Experts *e, const float *logits, const int32_t *chosen, float *shares) {
    float largest = logits[chosen[0]], sum = 0.0f;
    for (int c = 0; c < e->top_k; c++) {
        shares[c] = exp_negative(logits[chosen[c]] - largest);
        sum += shares[c];
    }
    if (!e->is_normalized) {
        sum = 0.0f;
        for (int i = 0; i < e->num_experts; i++)
            sum += exp_negative(logits[i] - largest);
    }
    for (int c = 0; c < e->top_k; c++)
        shares[c] /= sum;
}

static float sigmoid(float x) {
    float power = exp_negative(-__builtin_fabsf(x));
    return (x < 0.0f ? power : 1.0f) / (1.0f + power);
}

int route_tasks(const Experts *e, int threads) { return (int)least(e->count, threads); }

void route_work(const Experts *e, int task, int threads) {
    long parts = route_tasks(e, threads);
    for (long n = e->count * task / parts; n < e->count * (task + 1) / parts; n++) {
        const float *logits = e->logits + n * e->logits_stride, *x = e->x + n * e->columns;
        int32_t *chosen = e->chosen + n * e->top_k;
        if (e->norm.weight)
            normalize(&e->norm, x, e->columns, e->normed + n * e->columns);
        else
            memcpy(e->normed + n * e->columns, x, sizeof(float) * (size_t)e->columns);
        choose(e, logits, chosen);
        share(e, logits, chosen, e->shares + n * e->top_k);
        if (e->has_gate)
            e->factors[n] = sigmoid(logits[e->num_experts]);
    }
}

/* The choices of all tokens, in the order of the experts. */
typedef struct {
    int32_t *first;  /* (num_experts + 1): number of the first choice of an expert */
    int32_t *choice; /* (count * top_k): token * top_k + its choice */
    int active;      /* number of experts that a token chose */
} Order;

static long order_memory(const Experts *e) { return e->num_experts + 2 + (long)e->count * e->top_k; }

/* Sorts the choices. Each task sorts again, which is quicker than waiting for one that does. */
static Order sorted(const Experts *e, float *memory) {
    Order o = {.first = (int32_t *)memory};
    o.choice = o.first + e->num_experts + 2;
    memset(o.first, 0, sizeof(int32_t) * (size_t)(e->num_experts + 2));
    for (int i = 0; i < e->count * e->top_k; i++)
        o.first[e->chosen[i] + 2]++;
    for (int i = 0; i < e->num_experts; i++) {
        o.active += o.first[i + 2] > 0;
        o.first[i + 2] += o.first[i + 1];
    }
    for (int i = 0; i < e->count * e->top_k; i++)
        o.choice[o.first[e->chosen[i] + 1]++] = i;
    return o;
}

/* Maximum vectors of a task. */
static long most_vectors(const Experts *e) { return least(e->count, MOST); }

static Matrix of_expert(const Matrix *m, long stride, int expert) {
    Matrix found = *m;
    found.data = (const char *)m->data + stride * expert;
    return found;
}

/* Writes the vectors of the tokens of choices [first, first + count) to `memory`, and rounds them. */
static Vectors gathered(const Experts *e, const Order *o, int first, int count, float *memory) {
    int32_t *panels = (int32_t *)(memory + most_vectors(e) * e->columns);
    Vectors x = {.floats = e->normed, .panels = panels, .count = count};
    if (e->count > 1) {
        x.floats = memory;
        for (int n = 0; n < count; n++)
            memcpy(memory + n * e->columns, e->normed + o->choice[first + n] / e->top_k * e->columns,
                   sizeof(float) * (size_t)e->columns);
    }
    if (is_quantized(&e->gate))
        fill_panels(&x, e->columns, panels);
    return x;
}

long up_memory(const Experts *e) {
    return order_memory(e) + most_vectors(e) * (e->columns + rounded_size(e->columns));
}

/* The tiles of all chosen experts form one sequence. More tasks for several tokens, as some experts have more tokens. */
int up_tasks(const Experts *e, int threads) {
    long most = threads > 1 ? (e->count > 1 ? 8L : 2L) * threads : 1;
    return (int)least(e->top_k * tiles(&e->gate), most);
}

/* Computes tiles [from, to) of an expert for all tokens that chose it. */
static void up_expert(const Experts *e, const Order *o, int expert, long from, long to, float *memory) {
    Matrix gate = of_expert(&e->gate, e->up_stride, expert), up = of_expert(&e->up, e->up_stride, expert);
    float results[MOST * TILE], factors[MOST * TILE];
    for (int first = o->first[expert]; first < o->first[expert + 1]; first += MOST) {
        int count = (int)least(o->first[expert + 1] - first, MOST);
        Vectors x = gathered(e, o, first, count, memory);
        for (long t = from; t < to; t++) {
            long rows = least(gate.rows - t * TILE, TILE);
            multiply_tile(&gate, e->columns, t, &x, results);
            activate(e->function, 0.0f, results, (long)count * TILE);
            multiply_tile(&up, e->columns, t, &x, factors);
            for (int n = 0; n < count; n++)
                for (long r = 0; r < rows; r++)
                    e->activated[(first + n) * gate.rows + t * TILE + r] =
                        results[n * TILE + r] * factors[n * TILE + r];
        }
    }
}

void up_work(const Experts *e, int task, int threads, Member *member) {
    Order o = sorted(e, member->memory);
    long parts = up_tasks(e, threads), each = tiles(&e->gate), all = o.active * each, passed = 0;
    long start = all * task / parts, stop = all * (task + 1) / parts;
    for (int expert = 0; expert < e->num_experts; expert++) {
        if (o.first[expert] == o.first[expert + 1])
            continue;
        long from = start > passed ? start - passed : 0, to = least(stop - passed, each);
        if (from < to)
            up_expert(e, &o, expert, from, to, member->memory + order_memory(e));
        passed += each;
    }
}

long down_memory(const Experts *e) { return order_memory(e) + most_vectors(e) * rounded_size(e->gate.rows); }

/* A task computes its rows for all experts, so that no two tasks add to the same result. */
int down_tasks(const Experts *e, int threads) {
    return (int)least(tiles(&e->down), threads > 1 ? 2L * threads : 1);
}

/* Adds tiles [from, to) of an expert to the results of all tokens that chose it. */
static void down_expert(const Experts *e, const Order *o, int expert, long from, long to, int32_t *panels) {
    Matrix down = of_expert(&e->down, e->down_stride, expert);
    float results[MOST * TILE];
    for (int first = o->first[expert]; first < o->first[expert + 1]; first += MOST) {
        Vectors x = {.floats = e->activated + first * e->gate.rows, .panels = panels};
        x.count = (int)least(o->first[expert + 1] - first, MOST);
        if (is_quantized(&down))
            fill_panels(&x, e->gate.rows, panels);
        for (long t = from; t < to; t++) {
            multiply_tile(&down, e->gate.rows, t, &x, results);
            for (int n = 0; n < x.count; n++) {
                int choice = o->choice[first + n];
                add_scaled(e->out + choice / e->top_k * e->columns + t * TILE, results + n * TILE, e->shares[choice],
                           least(down.rows - t * TILE, TILE));
            }
        }
    }
}

void down_work(const Experts *e, int task, int threads, Member *member) {
    Order o = sorted(e, member->memory);
    long parts = down_tasks(e, threads), all = tiles(&e->down);
    long from = all * task / parts, to = all * (task + 1) / parts;
    long at = from * TILE, width = least(to * TILE, e->columns) - at;
    for (long n = 0; n < e->count; n++) {
        float *out = e->out + n * e->columns + at;
        memset(out, 0, sizeof(float) * (size_t)width);
        if (e->shared)
            add_scaled(out, e->shared + n * e->columns + at, e->has_gate ? e->factors[n] : 1.0f, width);
    }
    for (int expert = 0; expert < e->num_experts; expert++)
        down_expert(e, &o, expert, from, to, (int32_t *)(member->memory + order_memory(e)));
}
