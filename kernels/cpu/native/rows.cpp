// What a step is made of before its first layer: rows of the embedding, and where its tokens stand.
#include <string.h>

#include "moray_cpu.h"

extern "C" {

int moray_rows(const void *table, int64_t rows, int64_t row_bytes, const int64_t *numbers, int32_t count, void *out) {
    for (int32_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= rows) return -1;
    for (int32_t i = 0; i < count; i++)
        memcpy(static_cast<char *>(out) + i * row_bytes, static_cast<const char *>(table) + numbers[i] * row_bytes, row_bytes);
    return 0;
}

int moray_place(const int32_t *segment, int32_t segments, const int32_t *tables, int32_t page_size, const float *rotations,
                int64_t positions, int32_t rope, int64_t *cache_rows, float *rotation) {
    for (int32_t s = 0; s < segments; s++, segment += 4) {
        const int64_t token = segment[0], count = segment[1], first = segment[2];
        const int32_t *pages = tables + segment[3];
        if (first < 0 || first + count > positions) return -1;
        for (int64_t i = 0; i < count; i++)
            cache_rows[token + i] = static_cast<int64_t>(pages[(first + i) / page_size]) * page_size + (first + i) % page_size;
        memcpy(rotation + token * rope, rotations + first * rope, sizeof(float) * count * rope);
    }
    return 0;
}

}  // extern "C"
