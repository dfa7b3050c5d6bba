// Whether tiles of AMX are here, may be used, and compute what they should.
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

#if defined(__x86_64__) && __has_include(<amxtileintrin.h>)
#include <cpuid.h>

namespace {

#if defined(MORAY_AMX_MODEL)
bool allowed() { return true; }
#else
// The processor has them, and the system gives this process the room to save them (Linux from 5.16 on, Documentation/arch/x86/
// xstate.rst).
bool allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

// Small whole numbers, whose sums are exact in any order. Rows, columns and tokens are not whole tiles.
constexpr int ROWS = 72, COLS = 164, TOKENS = 19;
constexpr int SCALES[] = {1, 2};
constexpr uint8_t CODES[] = {0x00, 0x38, 0x40, 0x44, 0xB8};  // of VALUES, in e4m3
constexpr int VALUES[] = {0, 1, 2, 3, -1};

moray_bf16 bf16_of(int value) {
    const float number = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return static_cast<moray_bf16>(bits >> 16);
}

bool multiplies(const moray::Kernels &kernels, int kind) {
    alignas(64) static uint8_t packed[80 * COLS * 2];
    static uint8_t source[ROWS * COLS * 2];
    static moray_bf16 x[TOKENS * COLS];
    static float out[TOKENS * ROWS];
    static int weights[ROWS * COLS], activations[TOKENS * COLS];
    uint32_t seed = 1;
    const auto next = [&](int below) { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % below; };
    for (int i = 0; i < ROWS * COLS; i++) {
        const int which = next(5);
        weights[i] = VALUES[which];
        const moray_bf16 value = bf16_of(VALUES[which]);
        if (kind == MORAY_E4M3)
            source[i] = CODES[which];
        else
            memcpy(source + 2 * i, &value, 2);
    }
    for (int i = 0; i < TOKENS * COLS; i++) x[i] = bf16_of(activations[i] = next(7) - 3);
    moray_pack(source, COLS, ROWS, COLS, kind, packed);
    const float scales[] = {SCALES[0], SCALES[1]};
    const moray_matrix matrix = {packed, kind == MORAY_E4M3 ? scales : nullptr, ROWS, COLS, kind, 0};
    kernels.linear(x, TOKENS, &matrix, out, 1);
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) {
            int sum = 0;
            for (int c = 0; c < COLS; c++)
                sum += activations[t * COLS + c] * weights[r * COLS + c] * (kind == MORAY_E4M3 ? SCALES[c / 128] : 1);
            if (out[t * ROWS + r] != static_cast<float>(sum)) return false;
        }
    return true;
}

int probe() {
    if (!allowed()) return 0;
    moray::amx_kernels.prepare();
    return multiplies(moray::amx_kernels, MORAY_E4M3) && multiplies(moray::amx_kernels, MORAY_BF16) ? 1 : -1;
}

}  // namespace

extern "C" int moray_cpu_amx(void) {
    static const int found = probe();
    return found;
}
#else
extern "C" int moray_cpu_amx(void) { return 0; }
#endif
