/* Attention of `queries` query heads over `count` slots of the key head that they share. Elements have the type STORED
 * and are read by LOAD. cap: soft cap of the scores, 0 for none. Results, not yet divided by the sum: top, sum:
 * (queries), maximum and sum of the softmax; acc: (queries, dim), weighted values. */
INLINE void SPAN(const STORED *restrict keys, const STORED *restrict values, long count, const float *restrict query,
                 int queries, int dim, float cap, float *restrict top, float *restrict sum, float *restrict acc) {
    float scores[MAX_QUERIES * BLOCK];
    for (int i = 0; i < queries; i++) {
        top[i] = LOWEST;
        sum[i] = 0.0f;
    }
    memset(acc, 0, sizeof(float) * (size_t)queries * (size_t)dim);
    for (long first = 0; first < count; first += BLOCK) {
        int size = count - first < BLOCK ? (int)(count - first) : BLOCK;
        for (int j = 0; j < size; j++) {
            const STORED *row = keys + (first + j) * dim;
            for (int i = 0; i < queries; i++) {
                float dot = 0.0f;
                SIMD_SUM(dot)
                for (int d = 0; d < dim; d++)
                    dot += query[i * dim + d] * LOAD(row[d]);
                scores[i * BLOCK + j] = dot;
            }
        }
        for (int i = 0; i < queries; i++) {
            float *score = scores + i * BLOCK, highest = top[i], total = 0.0f;
            if (cap > 0.0f)
                activate(SOFTCAP, cap, score, size);
            for (int j = 0; j < size; j++)
                highest = score[j] > highest ? score[j] : highest;
            float fade = exp_negative(top[i] - highest);
            top[i] = highest;
            SIMD_SUM(total)
            for (int j = 0; j < size; j++) {
                score[j] = exp_negative(score[j] - highest);
                total += score[j];
            }
            sum[i] = sum[i] * fade + total;
            SIMD
            for (int d = 0; d < dim; d++)
                acc[i * dim + d] *= fade;
        }
        for (int j = 0; j < size; j++) {
            const STORED *row = values + (first + j) * dim;
            for (int i = 0; i < queries; i++) {
                float share = scores[i * BLOCK + j], *to = acc + i * dim;
                SIMD
                for (int d = 0; d < dim; d++)
                    to[d] += share * LOAD(row[d]);
            }
        }
    }
}
#undef SPAN
#undef STORED
#undef LOAD
