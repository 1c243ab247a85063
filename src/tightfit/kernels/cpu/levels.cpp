#include "levels.h"

#include <atomic>
#include <cstdint>

#ifdef TIGHTFIT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tightfit {
namespace {

#ifdef TIGHTFIT_X86
// Compilers know the names of features at different times, so the bits are read here.
struct Features {
    bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, amx = false;

    Features() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool saves = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
        if (!saves || !fma || !f16c) return;
        const uint64_t states = enabled_states();
        if ((states & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const unsigned leaf7b = b, leaf7c = c, leaf7d = d;
        unsigned leaf71a = 0;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf71a = a;
        avx2 = leaf7b >> 5 & 1;
        avxvnni = avx2 && leaf71a >> 4 & 1;
        const bool foundation = leaf7b >> 16 & 1, dq = leaf7b >> 17 & 1, bw = leaf7b >> 30 & 1, vl = leaf7b >> 31 & 1;
        avx512 = avx2 && foundation && dq && bw && vl && (states & 0xe6) == 0xe6;
        avx512vnni = avx512 && leaf7c >> 11 & 1;
        const bool tiles = leaf7d >> 24 & 1, tiles_bf16 = leaf7d >> 22 & 1, tiles_int8 = leaf7d >> 25 & 1;
        const bool vbmi = leaf7c >> 1 & 1, vbmi2 = leaf7c >> 6 & 1, vpopcnt = leaf7c >> 14 & 1;
        const bool more = vbmi && vbmi2 && vpopcnt && leaf71a >> 5 & 1;  // and bfloat16
        amx = avx512vnni && more && tiles && tiles_bf16 && tiles_int8 && (states & 0x60000) == 0x60000 &&
              granted();
    }

    static uint64_t enabled_states() {
        uint32_t low, high;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return uint64_t{high} << 32 | low;
    }

    // Linux gives the registers' 8 KiB a thread only to processes that ask.
    static bool granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
        constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
        return false;
#endif
    }
};
#endif

std::vector<Level> found() {
    std::vector<Level> levels;
#ifdef TIGHTFIT_X86
    const Features features;
    if (features.amx) levels.push_back(Level::amx);
    if (features.avx512vnni) levels.push_back(Level::avx512vnni);
    if (features.avx512) levels.push_back(Level::avx512);
    if (features.avxvnni) levels.push_back(Level::avxvnni);
    if (features.avx2) levels.push_back(Level::avx2);
#endif
    levels.push_back(Level::portable);
    return levels;
}

std::atomic<Level> current{supported_levels().front()};

}  // namespace

const char* name_of(Level level) {
    switch (level) {
        case Level::portable: return "portable";
        case Level::avx2: return "avx2";
        case Level::avxvnni: return "avxvnni";
        case Level::avx512: return "avx512";
        case Level::avx512vnni: return "avx512vnni";
        case Level::amx: return "amx";
    }
    return "";
}

const std::vector<Level>& supported_levels() {
    static const std::vector<Level> levels = found();
    return levels;
}

Level level() { return current.load(std::memory_order_relaxed); }

bool choose(const std::string& name) {
    for (Level level : supported_levels())
        if (name == name_of(level)) {
            current = level;
            return true;
        }
    return false;
}

}  // namespace tightfit
