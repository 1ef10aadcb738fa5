// The quantization operations on a CPU, for float and bfloat16; compiled by compiled.py on first use.
//
// Tensors are dense, [rows, n], with one clipping scalar per row. Sums are computed for each chunk and added up in the
// order of the chunks, so that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 4096;
constexpr int64_t RUN = 512;
constexpr double NEAR = 1.0 / 1024;   // as in intervals.py
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits, so halves round to even
constexpr int64_t WORTH_A_THREAD = 4 * CHUNK;  // with fewer elements per thread, threads cost more than they save

struct BFloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float value, float& to) { to = value; }

inline void store(float value, BFloat16& to) {  // rounds half to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to.bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
}

// Which sides of zero count: the upper one; both, ending at the same distance; or both, ending at different distances.
enum Kind { UNSIGNED, SIGNED, SIDED };

// For a row whose sides end at different distances (cost.py): factors and weights of magnitudes above and below zero.
struct Sides {
    float above = 1, below = 1, weight_above = 1, weight_below = 1;
};

template <Kind KIND>
inline float magnitude(float x, const Sides& sides) {
    if (KIND == SIGNED) return std::fabs(x);
    const float above = x * sides.above, below = KIND == SIDED ? -x * sides.below : 0.0f;
    return above < below ? below : above;
}

inline float clamp(float x, float low, float high) {  // NaN stays NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}

// The sums over a row that OCTAV needs at a clipping scalar s. All are in units of the row's `unit`, and all except the
// last two are weighted.
struct Sums {
    double excess = 0;   // sum of (a - s) over a > s
    double outside = 0;  // number of a > s
    double total = 0;    // sum of a
    double nonzero = 0;  // number of a > 0
    double largest = 0;  // the largest a
    double count = 0;    // number of a > 0

    void add(const Sums& other) {
        excess += other.excess;
        outside += other.outside;
        total += other.total;
        nonzero += other.nonzero;
        largest = std::max(largest, other.largest);
        count += other.count;
    }
};

// n is at most RUN, so that float sums stay close to exact. Elements are counted in integers, which is fast.
template <typename T, Kind KIND>
inline Sums sums_of_run(const T* x, int64_t n, float scale, float s, bool everything) {
    float excess = 0, total = 0, largest = 0;
    int32_t outside = 0, nonzero = 0;
    if (everything) {
#pragma omp simd reduction(+ : excess, outside, total, nonzero) reduction(max : largest)
        for (int64_t i = 0; i < n; ++i) {
            const float raw = magnitude<KIND>(load(x[i]), Sides()), a = raw * scale;
            excess += a > s ? a - s : 0.0f;
            outside += a > s;
            total += a;
            nonzero += raw > 0;
            largest = a > largest ? a : largest;
        }
    } else {
#pragma omp simd reduction(+ : excess, outside)
        for (int64_t i = 0; i < n; ++i) {
            const float a = magnitude<KIND>(load(x[i]), Sides()) * scale;
            excess += a > s ? a - s : 0.0f;
            outside += a > s;
        }
    }
    const double count = nonzero;
    return {excess, static_cast<double>(outside), total, count, largest, count};
}

// The same for a row with two different sides. Each element lies on one side, and its magnitude is the larger of two
// linear functions. It is compared with s before it is weighted: products are rounded, and the largest element must not
// compare as larger than itself.
template <typename T>
inline Sums sums_of_sides(const T* x, int64_t n, const Sides& sides, float scale, float s, bool everything) {
    const float up = sides.above * scale, down = -sides.below * scale;
    const float w_up = sides.weight_above, w_down = sides.weight_below;
    float excess = 0, total = 0, lowest = 0, highest = 0;
    int32_t outside_above = 0, outside_below = 0, positive = 0, negative = 0;
    if (everything) {
#pragma omp simd reduction(+ : excess, outside_above, outside_below, total, positive, negative) \
    reduction(min : lowest) reduction(max : highest)
        for (int64_t i = 0; i < n; ++i) {
            const float v = load(x[i]), a = v * up, b = v * down;
            excess += (a > s ? (a - s) * w_up : 0.0f) + (b > s ? (b - s) * w_down : 0.0f);
            outside_above += a > s, outside_below += b > s;
            total += std::max(a * w_up, b * w_down);
            positive += v > 0, negative += v < 0;
            lowest = v < lowest ? v : lowest, highest = v > highest ? v : highest;
        }
    } else {
#pragma omp simd reduction(+ : excess, outside_above, outside_below)
        for (int64_t i = 0; i < n; ++i) {
            const float v = load(x[i]), a = v * up, b = v * down;
            excess += (a > s ? (a - s) * w_up : 0.0f) + (b > s ? (b - s) * w_down : 0.0f);
            outside_above += a > s, outside_below += b > s;
        }
    }
    const auto weigh = [&](int32_t of_above, int32_t of_below) {
        return static_cast<double>(sides.weight_above) * of_above + static_cast<double>(sides.weight_below) * of_below;
    };
    const float largest = std::max(highest * up, lowest * down);
    return {excess,  weigh(outside_above, outside_below),         total, weigh(positive, negative),
            largest, static_cast<double>(positive + negative)};
}

template <typename T, Kind KIND>
Sums sums_of_chunk(const T* x, int64_t n, const Sides& sides, float scale, float s, bool everything) {
    Sums result;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t length = std::min(RUN, n - i);
        if constexpr (KIND == SIDED)
            result.add(sums_of_sides(x + i, length, sides, scale, s, everything));
        else
            result.add(sums_of_run<T, KIND>(x + i, length, scale, s, everything));
    }
    return result;
}

// Returns the sum of `sums_of(first, length)` over the chunks of a row of n elements, in order.
template <typename Result, typename Work>
Result over_chunks(int64_t n, int threads, const Work& sums_of) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    Result result;
    if (threads == 1) {
        for (int64_t c = 0; c < chunks; ++c) result.add(sums_of(c * CHUNK, std::min(CHUNK, n - c * CHUNK)));
        return result;
    }
    std::vector<Result> parts(chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; ++c) parts[c] = sums_of(c * CHUNK, std::min(CHUNK, n - c * CHUNK));
    for (const Result& part : parts) result.add(part);
    return result;
}

template <typename T, Kind KIND>
Sums sums_of_row(const T* x, int64_t n, const Sides& sides, float scale, float s, bool everything, int threads) {
    return over_chunks<Sums>(n, threads, [&](int64_t first, int64_t length) {
        return sums_of_chunk<T, KIND>(x + first, length, sides, scale, s, everything);
    });
}

// An interval [lo, hi] that contains the sign change of g. The algorithm is that of newton.py, where it is explained.
struct Bracket {
    double k, nonzero;
    double lo = 0, sum_lo, outside_lo, hi, sum_hi = 0, outside_hi = 0;

    Bracket(double k, const Sums& at)
        : k(k * (at.nonzero > 0 ? at.count / at.nonzero : 1)), nonzero(at.nonzero), sum_lo(at.total), outside_lo(at.nonzero), hi(at.largest) {}

    double propose(double s, const Sums& at) {
        const double above = at.excess + s * at.outside, cost = k * s * (nonzero - at.outside);
        const bool is_short = cost < at.excess;
        if (is_short) {
            lo = s, sum_lo = above, outside_lo = at.outside;
        } else if (s <= hi) {
            hi = s, sum_hi = above, outside_hi = at.outside;
        }
        const double between = outside_lo - outside_hi;  // elements in (lo, hi]
        const double mean = between > 0 ? (sum_lo - sum_hi) / between : 0;
        const double newton_lo = newton(sum_lo, outside_lo);
        if (between <= 1 || mean >= hi * (1 - 1e-6))
            return std::min({newton_lo, std::max(mean, newton(sum_hi, outside_hi)), hi});
        const double log_newton = s - (std::log(cost) - std::log(at.excess)) / (1 / s + at.outside / at.excess);
        const bool returns = is_short ? log_newton >= hi * (1 - 2e-7) : log_newton <= lo * (1 + 2e-7);
        if ((lo < log_newton && log_newton < hi && !returns) || log_newton == s) return log_newton;
        if (lo == 0 && at.outside == 0) return 0.8 * hi;
        const double divides = lo < mean && mean < hi ? mean : (lo + hi) / 2;  // because of rounding errors in the sums
        return newton_lo < divides ? (newton_lo + hi) / 2 : divides;
    }

    double newton(double sum, double outside) const {  // the published Newton step
        return sum / std::max(k * (nonzero - outside) + outside, k);
    }
};

template <typename T, Kind KIND>
float largest_of_row(const T* x, int64_t n, const Sides& sides, int threads) {
    float largest = 0;
    if (threads == 1) {
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude<KIND>(load(x[i]), sides));
        return largest;
    }
#pragma omp parallel for simd num_threads(threads) reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude<KIND>(load(x[i]), sides));
    return largest;
}

struct Settings {
    double k, tolerance;
    int iterations;
    bool cold;
    float reach;         // how far the shorter side reaches, over how far the other one reaches
    const float* short_; // negative in rows where the shorter side is the negative one; null: in none
};

bool usable(float magnitude) { return magnitude > 0 && magnitude <= std::numeric_limits<float>::max(); }

double power_of_two(float magnitude) {  // at or below `magnitude`; no subnormal, so that its inverse exists
    return std::ldexp(1.0, std::min(std::max(std::ilogb(magnitude), -126), 125));
}

// Returns the sides of a row whose shorter side, the one of `sign`, reaches `reach` times as far as the other.
Sides sides_of(float reach, float sign) {
    Sides sides;
    (sign < 0 ? sides.above : sides.below) = reach;
    (sign < 0 ? sides.weight_above : sides.weight_below) = 1 / (reach * reach);
    return sides;
}

template <typename T, Kind KIND>
float solve_row(const T* x, int64_t n, float guess, const Sides& sides, const Settings& set, int threads) {
    guess = set.cold ? largest_of_row<T, KIND>(x, n, sides, threads) : guess * set.reach;
    const double unit = power_of_two(guess = usable(guess) ? guess : 1);
    const float scale = static_cast<float>(1 / unit);
    double s = guess / unit;
    Sums at = sums_of_row<T, KIND>(x, n, sides, scale, static_cast<float>(s), true, threads);
    if (!std::isfinite(at.total)) return std::numeric_limits<float>::quiet_NaN();
    Bracket bracket(set.k, at);  // already contains all that a read at the largest magnitude can show
    if (set.cold) s = at.total / std::max(at.nonzero, 1.0);
    for (int i = 0; i < set.iterations; ++i) {
        const float here = static_cast<float>(s);
        if (i > 0 || set.cold) at = sums_of_row<T, KIND>(x, n, sides, scale, here, false, threads);
        s = bracket.propose(here, at);
        if (std::fabs(s - here) <= set.tolerance * s) break;
    }
    return static_cast<float>(s * unit) / set.reach;
}

// Returns how many of the threads are worth starting for this number of elements.
int worth(int64_t elements, int threads) {
    return static_cast<int>(std::max<int64_t>(std::min<int64_t>(elements / WORTH_A_THREAD, threads), 1));
}

// Calls work(row, threads) for each row; work may distribute the elements of the row over that number of threads.
template <typename Work>
void by_rows(int64_t rows, int64_t n, int threads, const Work& work) {
    const int of_row = worth(n, threads);
    threads = worth(rows * n, threads);
    if (threads == 1 || (rows < 2 * threads && of_row > 1)) {  // no outer region: nested ones would start new threads
        for (int64_t r = 0; r < rows; ++r) work(r, of_row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; ++r) work(r, 1);
}

template <typename T, Kind KIND>
void solve(const T* x, int64_t rows, int64_t n, const float* guess, const Settings& set, int threads, float* s) {
    by_rows(rows, n, threads, [&](int64_t r, int its_threads) {
        const Sides sides = KIND == SIDED ? sides_of(set.reach, set.short_ ? set.short_[r] : 1) : Sides();
        s[r] = solve_row<T, KIND>(x + r * n, n, set.cold ? 0 : guess[r], sides, set, its_threads);
    });
}

struct Total {
    double value = 0;

    void add(const Total& other) { value += other.value; }
};

// Returns the overhang of a chunk: by how much elements lie above t, minus by how much they lie below -t.
template <typename T>
Total overhang_of_chunk(const T* x, int64_t n, float t) {
    Total result;
    for (int64_t i = 0; i < n; i += RUN) {
        float sum = 0;
        const T* run = x + i;
        const int64_t length = std::min(RUN, n - i);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < length; ++j) {
            const float v = load(run[j]);
            sum += v - clamp(v, -t, t);
        }
        result.value += sum;
    }
    return result;
}

// Gives scalars their signs by the overhang. Signs in `before`, if any, are kept unless the overhang is large.
template <typename T>
void orient(const void* x, const float* s, const float* before, int64_t rows, int64_t n, double halfway, double clearly,
            int threads, float* out) {
    const T* values = static_cast<const T*>(x);
    by_rows(rows, n, threads, [=](int64_t r, int its_threads) {
        const float t = static_cast<float>(s[r] * halfway);
        const double overhang = over_chunks<Total>(n, its_threads, [&](int64_t first, int64_t length) {
            return overhang_of_chunk(values + r * n + first, length, t);
        }).value;
        const double sign = before == nullptr ? 1 : std::copysign(1.0, before[r]);
        const double large = before == nullptr ? 0 : clearly * s[r] * n;
        out[r] = static_cast<float>(std::copysign(s[r], overhang * sign > large ? -sign : sign));
    });
}

// The sums of a row outside an interval [-v, u], in units of the row: x - u and 1 over x > u, likewise below -v; and
// the sum of the squares of both sides.
struct Beyond {
    double excess_u = 0, outside_u = 0, excess_v = 0, outside_v = 0, square = 0;
    float low = 0, high = 0;  // extremes, zero included
    double count = 0;         // number of x != 0; NaN if an element is not finite

    void add(const Beyond& other) {
        excess_u += other.excess_u, outside_u += other.outside_u;
        excess_v += other.excess_v, outside_v += other.outside_v, square += other.square;
        low = std::min(low, other.low), high = std::max(high, other.high), count += other.count;
    }
};

template <typename T>
Beyond beyond_of_run(const T* x, int64_t n, float scale, float u, float v) {
    float excess_u = 0, excess_v = 0, square = 0;
    int32_t outside_u = 0, outside_v = 0;
#pragma omp simd reduction(+ : excess_u, outside_u, excess_v, outside_v, square)
    for (int64_t i = 0; i < n; ++i) {
        const float a = load(x[i]) * scale;
        const float over = a > u ? a - u : 0.0f, under = a < -v ? -v - a : 0.0f;
        excess_u += over, outside_u += a > u;
        excess_v += under, outside_v += a < -v;
        square += over * over + under * under;
    }
    return {excess_u, static_cast<double>(outside_u), excess_v, static_cast<double>(outside_v), square};
}

template <typename T>
void extremes_of_run(const T* x, int64_t n, float scale, Beyond& to) {
    float low = 0, high = 0, broken = 0;
    int32_t count = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : count, broken)
    for (int64_t i = 0; i < n; ++i) {
        const float value = load(x[i]), a = value * scale;
        low = a < low ? a : low, high = a > high ? a : high, count += value != 0, broken += value - value;
    }
    to.low = low, to.high = high, to.count = count + broken;
}

template <typename T>
Beyond beyond(const T* x, int64_t n, float scale, float u, float v, bool everything, int threads) {
    return over_chunks<Beyond>(n, threads, [=](int64_t first, int64_t length) {
        Beyond result;
        for (int64_t i = first; i < first + length; i += RUN) {
            const int64_t of_run = std::min(RUN, first + length - i);
            Beyond part = beyond_of_run(x + i, of_run, scale, u, v);
            if (everything) extremes_of_run(x + i, of_run, scale, part);
            result.add(part);
        }
        return result;
    });
}

// The iteration for an interval. The algorithm is that of intervals.py, where it is explained.
struct Interval {
    double k, count, top_u, top_v, u, v;
    double best_u = top_u, best_v = top_v, extremes = k * (top_u + top_v) * (top_u + top_v) * count, least = extremes;
    double lo_u = 0, lo_v = 0, moved = 0;
    bool worse = false;

    void advance(const Beyond& at) {
        const double tiny = std::numeric_limits<double>::min(), width = u + v;
        const double inside = count - at.outside_u - at.outside_v;
        const double cost = k * width * width * inside + at.square;
        if (cost < least) least = cost, best_u = u, best_v = v;
        worse = cost > extremes;
        const bool clips_u = at.excess_u > 0, clips_v = at.excess_v > 0;
        if (clips_u) lo_u = std::max(lo_u, u);
        if (clips_v) lo_v = std::max(lo_v, v);
        const double level = std::log(std::max(k * width * inside, tiny)), both = 1 / std::max(width, tiny);
        const double p = clips_u ? at.outside_u / at.excess_u : 0, q = clips_v ? at.outside_v / at.excess_v : 0;
        const double off_u = clips_u ? level - std::log(at.excess_u) : 0, off_v = clips_v ? level - std::log(at.excess_v) : 0;
        double step_u = -off_u / (both + p), step_v = -off_v / (both + q);
        if (clips_u && clips_v) {
            const double determinant = both * (p + q) + p * q;
            step_u = (both * off_v - off_u * (both + q)) / determinant;
            step_v = (both * off_u - off_v * (both + p)) / determinant;
        }
        const double next_u = next(u, u + step_u, top_u, lo_u, clips_u), next_v = next(v, v + step_v, top_v, lo_v, clips_v);
        moved = (std::fabs(next_u - u) + std::fabs(next_v - v)) * both;
        u = next_u, v = next_v;
    }

    static double next(double s, double proposed, double top, double lo, bool clips) {
        if (!clips) return lo > 0 ? (lo + s) / 2 : 0.8 * s;
        return std::min({std::max(proposed, s / 2), 2 * s, top});
    }

    bool solved() const { return !worse && moved <= 0.1 * std::sqrt(12 * k); }
};

// The start, low and high, is used unless it is too close to zero to say anything about x. The result is NaN for a row
// that is not finite.
template <typename T>
void interval_of_row(const T* x, int64_t n, const float* start_low, const float* start_high, const Settings& set,
                     int threads, float* low, float* high) {
    const bool warm = start_low != nullptr && *start_low <= 0 && *start_high >= 0 && usable(std::max(-*start_low, *start_high));
    double unit;
    if (warm) {
        unit = power_of_two(std::max(-*start_low, *start_high));
    } else {
        const Beyond all = beyond(x, n, 1, 0, 0, true, threads);
        unit = power_of_two(std::max(-all.low, all.high));
    }
    const float scale = static_cast<float>(1 / unit);
    double u = warm ? *start_high / unit : 0, v = warm ? -*start_low / unit : 0;
    Beyond at = beyond(x, n, scale, static_cast<float>(u), static_cast<float>(v), true, threads);
    if (!(at.count > 0)) {  // 0 if all are zeros, NaN if one is not finite
        *low = *high = static_cast<float>(at.count);
        return;
    }
    const double top_u = at.high, top_v = -at.low;
    if (warm && !(at.square <= std::numeric_limits<float>::max() && u >= NEAR * top_u && v >= NEAR * top_v))
        return interval_of_row<T>(x, n, nullptr, nullptr, set, threads, low, high);  // the start is far from x
    if (!warm) {
        u = 2 * at.excess_u / std::max(at.outside_u, 1.0), v = 2 * at.excess_v / std::max(at.outside_v, 1.0);
    }
    const auto within = [](double end, double top) { return end > 0 && end < top ? std::max(end, NEAR * top) : top; };
    Interval interval{set.k, at.count, top_u, top_v, within(u, top_u), within(v, top_v)};
    for (int i = 0; i < set.iterations; ++i) {
        const float here_u = static_cast<float>(interval.u), here_v = static_cast<float>(interval.v);
        interval.u = here_u, interval.v = here_v;
        if (i > 0 || !warm) at = beyond(x, n, scale, here_u, here_v, false, threads);
        interval.advance(at);
        if (interval.moved <= set.tolerance) break;
    }
    const bool solved = interval.solved();
    *high = static_cast<float>((solved ? interval.u : interval.best_u) * unit);
    *low = static_cast<float>(-(solved ? interval.v : interval.best_v) * unit);
}

// start, ends: low of all rows, then high of all rows.
template <typename T>
void intervals(const void* x, int64_t rows, int64_t n, const float* start, const Settings& set, int threads,
               float* ends) {
    const T* values = static_cast<const T*>(x);
    by_rows(rows, n, threads, [=](int64_t r, int its_threads) {
        interval_of_row(values + r * n, n, start ? start + r : nullptr, start ? start + rows + r : nullptr, set,
                        its_threads, ends + r, ends + rows + r);
    });
}

struct Levels {
    float resolution, lowest, highest;
};

// The sums over a row's codes c at a candidate: sum x c and sum c^2.
struct Fit {
    double along = 0, squares = 0;

    void add(const Fit& other) { along += other.along, squares += other.squares; }
};

template <typename T>
Fit fit_of_chunk(const T* x, int64_t n, float per_step, Levels levels) {
    Fit result;
    for (int64_t i = 0; i < n; i += RUN) {
        float along = 0, squares = 0;
        const T* run = x + i;
        const int64_t length = std::min(RUN, n - i);
#pragma omp simd reduction(+ : along, squares)
        for (int64_t j = 0; j < length; ++j) {
            const float v = load(run[j]);
            const float code = clamp(v * per_step, levels.lowest, levels.highest) + ROUND - ROUND;
            along += v * code;
            squares += code * code;
        }
        result.along += along, result.squares += squares;
    }
    return result;
}

template <typename T>
float refine_row(const T* x, int64_t n, float s, Levels levels, const float* factors, int tried, int threads) {
    double most = 0;
    float best = s;
    for (int i = 0; i < tried && s != 0; ++i) {
        const float per_step = levels.resolution / (s * factors[i]);
        const Fit fit = over_chunks<Fit>(n, threads, [&](int64_t first, int64_t length) {
            return fit_of_chunk(x + first, length, per_step, levels);
        });
        const double step = fit.along / (fit.squares > 0 ? fit.squares : 1);
        if (fit.along * step > most) most = fit.along * step, best = static_cast<float>(step * levels.resolution);
    }
    return best;
}

template <typename T>
void refine(const void* x, const float* s, int64_t rows, int64_t n, Levels levels, const float* factors, int tried,
            int threads, float* out) {
    const T* values = static_cast<const T*>(x);
    by_rows(rows, n, threads, [=](int64_t r, int its_threads) {
        out[r] = refine_row(values + r * n, n, s[r], levels, factors, tried, its_threads);
    });
}

// out = the code nearest to x / unit * resolution, clamped to the lowest and highest code, times unit / resolution.
template <typename T>
void quantize_piece(const T* x, int64_t n, float unit, Levels levels, T* out) {
    const float divisor = unit == 0 ? 1 : unit, step = 1 / levels.resolution;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float code = clamp(load(x[i]) / divisor * levels.resolution, levels.lowest, levels.highest);
        store((code + ROUND - ROUND) * step * unit, out[i]);
    }
}

// Returns the step size of an affine row; sets its lowest and highest code minus the zero point (see formats.py).
float affine_step(float low, float high, float steps, Levels& codes) {
    const float step = (high - low) / steps;
    const float zero = clamp(std::nearbyint(-low / (step == 0 ? 1 : step)), 0, steps);
    codes = {1, -zero, steps - zero};
    return step;
}

template <typename T, bool MAD>
void backward_piece(const T* grad, const T* x, int64_t n, float low, float high, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float v = load(x[i]), g = load(grad[i]);
        const float factor = MAD ? clamp(v, low, high) / v : 0.0f;
        store(MAD ? (v == 0 ? g : factor * g) : (v >= low && v <= high ? g : 0.0f), out[i]);
    }
}

// Calls work(offset, length, row) for pieces of [rows, n] that together cover it.
template <typename Work>
void in_pieces(int64_t rows, int64_t n, int threads, const Work& work) {
    const int64_t pieces = (n + CHUNK - 1) / CHUNK;
    threads = worth(rows * n, threads);
    if (threads == 1) {  // a parallel region of one thread costs as much as a short row
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t begin = 0; begin < n; begin += CHUNK) work(row * n + begin, std::min(CHUNK, n - begin), row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < rows * pieces; ++p) {
        const int64_t row = p / pieces, begin = p % pieces * CHUNK;
        work(row * n + begin, std::min(CHUNK, n - begin), row);
    }
}

template <typename T>
void quantize(const void* x, const float* s, int64_t rows, int64_t n, int parts, Levels levels, int threads, void* out) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    in_pieces(rows, n, threads, [=](int64_t at, int64_t length, int64_t row) {
        Levels its = levels;
        const float unit = parts == 1 ? s[row] : affine_step(s[row], s[rows + row], levels.resolution, its);
        quantize_piece(from + at, length, unit, its, to + at);
    });
}

// The same as remembered.py, where it is explained; s belongs to the call, the other pointers to the state.
void remember(const float* s, int64_t rows, float momentum, float* state_s, float* running_s, int64_t* batches) {
    for (int64_t r = 0; r < rows; ++r) {
        if (std::fabs(s[r]) <= std::numeric_limits<float>::max()) state_s[r] = s[r];
        const float newest = state_s[r], before = running_s[r];  // as PyTorch's lerp
        running_s[r] = momentum < 0.5f ? std::fma(momentum, newest - before, before)
                                       : std::fma(momentum - 1, newest - before, newest);
    }
    ++*batches;
}

template <typename T, bool MAD>
void quantize_backward(const void* grad, const void* x, const float* s, int64_t rows, int64_t n, int parts,
                       bool is_signed, int threads, void* out) {
    const T *g = static_cast<const T*>(grad), *from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    in_pieces(rows, n, threads, [=](int64_t at, int64_t length, int64_t row) {
        const float high = parts == 2 ? s[rows + row] : std::fabs(s[row]);
        const float low = parts == 2 ? s[row] : is_signed ? -high : 0;
        backward_piece<T, MAD>(g + at, from + at, length, low, high, to + at);
    });
}

template <typename T>
void solve_any(const void* x, int64_t rows, int64_t n, const float* guess, const Settings& set, bool is_signed,
               int threads, float* s) {
    const T* values = static_cast<const T*>(x);
    const auto solver = !is_signed ? solve<T, UNSIGNED> : set.reach == 1 ? solve<T, SIGNED> : solve<T, SIDED>;
    solver(values, rows, n, guess, set, threads, s);
}

// The sums over a row for a learned grid's gradient: for the step size or the scalar, and for the lower bound, if any.
struct Learned {
    double of_scale = 0, of_low = 0;

    void add(const Learned& other) { of_scale += other.of_scale, of_low += other.of_low; }
};

// The grid of a row: the divisor and codes of quantize_piece; in `base`, the code of the lower of two bounds, or 0; the
// clipping bounds; and whether the lower clipping bound depends on what is learned.
struct LearnedGrid {
    float divisor;
    Levels codes;
    float base, low, high;
    float counts_below;  // 1 or 0
};

// n is at most RUN. With ROUNDING, code - x / step counts inside the clipping interval, and code - base outside it;
// without it, only elements at or beyond the clipping bounds count.
template <typename T, bool ROUNDING>
inline Learned learned_of_run(const T* grad, const T* x, int64_t n, const LearnedGrid grid, T* out) {
    const auto [divisor, codes, base, low, high, counts_below] = grid;
    float of_scale = 0, of_low = 0;
#pragma omp simd reduction(+ : of_scale, of_low)
    for (int64_t i = 0; i < n; ++i) {
        const float v = load(x[i]), g = load(grad[i]);
        if (ROUNDING) {
            const float steps = v / divisor * codes.resolution;
            const bool inside = (steps > codes.lowest) & (steps < codes.highest);
            const float code = clamp(steps, codes.lowest, codes.highest) + ROUND - ROUND, passed = inside ? g : 0.0f;
            of_scale += g * (code - (inside ? steps : base));
            of_low += counts_below * (g - passed);
            store(passed, out[i]);
        } else {
            const bool above = v >= high, below = v <= low;
            of_scale += (above ? g : 0.0f) - counts_below * (below ? g : 0.0f);
            store(above | below ? 0.0f : g, out[i]);
        }
    }
    return {of_scale, of_low};
}

template <typename T, bool ROUNDING>
void learned_backward(const void* grad, const void* x, const float* s, int64_t rows, int64_t n, int parts, Levels levels,
                      bool is_signed, int threads, void* out, float* sums) {
    const T *g = static_cast<const T*>(grad), *from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    by_rows(rows, n, threads, [=](int64_t r, int its_threads) {
        LearnedGrid grid{s[r] == 0 ? 1 : s[r], levels, 0, is_signed ? -s[r] : 0, s[r], is_signed ? 1.0f : 0.0f};
        if (parts == 2) {
            const float step = affine_step(s[r], s[rows + r], levels.resolution, grid.codes);
            grid.divisor = step == 0 ? 1 : step, grid.base = grid.codes.lowest;
        }
        const Learned sum = over_chunks<Learned>(n, its_threads, [&](int64_t first, int64_t length) {
            Learned chunk;
            for (int64_t i = first; i < first + length; i += RUN) {
                const int64_t at = r * n + i, some = std::min(RUN, first + length - i);
                chunk.add(learned_of_run<T, ROUNDING>(g + at, from + at, some, grid, to + at));
            }
            return chunk;
        });
        sums[r] = static_cast<float>(sum.of_scale);
        if (parts == 2) sums[rows + r] = static_cast<float>(sum.of_low);
    });
}

// One of several tensors that are quantized alike, in the layout that Python passes: addresses and sizes, 8 bytes each.
struct Part {
    const void* x;
    int64_t rows, n;
    float *state_s, *running_s;
    int64_t* batches;
    float* s;
    void* out;
};

// The same for the gradient of one of several tensors.
struct GradientPart {
    const void *grad, *x;
    int64_t rows, n;
    const float* s;
    void* out;
};

// Calls work(part, first row, rows, threads) so that all rows of all parts are covered: parts with few, long rows one
// after another, each by several threads; the others in bunches of rows, by one thread each.
template <typename Work>
void by_bunches(const Part* parts, int64_t count, int threads, const Work& work) {
    struct Bunch {
        const Part* part;
        int64_t first, rows;
    };
    std::vector<Bunch> bunches;
    int64_t elements = 0;
    for (const Part* part = parts; part < parts + count; ++part) {
        if (const int of_row = worth(part->n, threads); part->rows < 2 * threads && of_row > 1) {
            work(*part, 0, part->rows, of_row);
            continue;
        }
        const int64_t step = std::max<int64_t>(CHUNK / part->n, 1);
        for (int64_t first = 0; first < part->rows; first += step)
            bunches.push_back({part, first, std::min(step, part->rows - first)});
        elements += part->rows * part->n;
    }
    threads = worth(elements, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (size_t i = 0; i < bunches.size(); ++i) work(*bunches[i].part, bunches[i].first, bunches[i].rows, 1);
}

// Training steps of several tensors: each row of a bunch is solved and rounded while it is in the cache.
template <typename T>
void steps(const Part* parts, int64_t count, const Settings& set, bool is_signed, bool warm, float levels_per_scalar,
           Levels grid, int threads) {
    const auto solver = !is_signed      ? solve_row<T, UNSIGNED>
                        : set.reach == 1 ? solve_row<T, SIGNED>
                                         : solve_row<T, SIDED>;
    const Sides sides = set.reach == 1 ? Sides() : sides_of(set.reach, 1);
    by_bunches(parts, count, threads, [&](const Part& part, int64_t first, int64_t rows, int its_threads) {
        for (int64_t r = first; r < first + rows; ++r) {
            const T* x = static_cast<const T*>(part.x) + r * part.n;
            const float s = solver(x, part.n, warm ? part.state_s[r] : 0, sides, set, its_threads);
            const float unit = levels_per_scalar == grid.resolution ? s : s / levels_per_scalar * grid.resolution;
            part.s[r] = s;
            in_pieces(1, part.n, its_threads, [=, out = static_cast<T*>(part.out) + r * part.n](int64_t at, int64_t length, int64_t) {
                quantize_piece(x + at, length, unit, grid, out + at);
            });
        }
    });
}

template <typename T, bool MAD>
void quantize_backward_of_many(const GradientPart* parts, int64_t count, bool is_signed, int threads) {
    struct Piece {
        const GradientPart* part;
        int64_t row, begin;
    };
    std::vector<Piece> pieces;
    int64_t elements = 0;
    for (const GradientPart* part = parts; part < parts + count; ++part) {
        for (int64_t row = 0; row < part->rows; ++row)
            for (int64_t begin = 0; begin < part->n; begin += CHUNK) pieces.push_back({part, row, begin});
        elements += part->rows * part->n;
    }
    threads = worth(elements, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (size_t i = 0; i < pieces.size(); ++i) {
        const GradientPart& part = *pieces[i].part;
        const int64_t at = pieces[i].row * part.n + pieces[i].begin;
        const float high = std::fabs(part.s[pieces[i].row]), low = is_signed ? -high : 0;
        backward_piece<T, MAD>(static_cast<const T*>(part.grad) + at, static_cast<const T*>(part.x) + at,
                               std::min(CHUNK, part.n - pieces[i].begin), low, high, static_cast<T*>(part.out) + at);
    }
}

}  // namespace

// x, grad, out: float, or BFloat16 if `half`. s, guess, short_, before: float [rows], or [parts, rows]. guess: null for
// a cold start. For fake quantization, s contains full scales.
extern "C" {

void qat_octav(int half, const void* x, int64_t rows, int64_t n, const float* guess, double k, int is_signed,
               double reach, const float* short_, int iterations, double tolerance, int threads, float* s) {
    const Settings set{k, tolerance, iterations, guess == nullptr, static_cast<float>(reach), short_};
    half ? solve_any<BFloat16>(x, rows, n, guess, set, is_signed, threads, s)
         : solve_any<float>(x, rows, n, guess, set, is_signed, threads, s);
}

void qat_orient(int half, const void* x, const float* s, const float* before, int64_t rows, int64_t n, double halfway,
                double clearly, int threads, float* out) {
    (half ? orient<BFloat16> : orient<float>)(x, s, before, rows, n, halfway, clearly, threads, out);
}

void qat_refine(int half, const void* x, const float* s, int64_t rows, int64_t n, int levels_per_scalar, int lowest,
                int highest, const float* factors, int tried, int threads, float* out) {
    const Levels grid{static_cast<float>(levels_per_scalar), static_cast<float>(lowest), static_cast<float>(highest)};
    (half ? refine<BFloat16> : refine<float>)(x, s, rows, n, grid, factors, tried, threads, out);
}

// With two parts, s contains low and high of each row, and the resolution is the number of steps between them.
void qat_fake_quantize(int half, const void* x, const float* s, int64_t rows, int64_t n, int parts, int resolution,
                       int lowest, int highest, int threads, void* out) {
    const Levels grid{static_cast<float>(resolution), static_cast<float>(lowest), static_cast<float>(highest)};
    (half ? quantize<BFloat16> : quantize<float>)(x, s, rows, n, parts, grid, threads, out);
}

// One training step. The levels are those of qat_fake_quantize, preceded by the number of steps in s.
void qat_octav_and_quantize(int half, const void* x, int64_t rows, int64_t n, double k, int is_signed, double reach,
                            int iterations, double tolerance, int levels_per_scalar, int resolution, int lowest,
                            int highest, int warm, double momentum, float* state_s, float* running_s, int64_t* batches,
                            int threads, float* s, void* out) {
    qat_octav(half, x, rows, n, warm ? state_s : nullptr, k, is_signed, reach, nullptr, iterations, tolerance, threads, s);
    remember(s, rows, static_cast<float>(momentum), state_s, running_s, batches);
    const float per_scalar = static_cast<float>(levels_per_scalar), steps = static_cast<float>(resolution);
    const Levels grid{steps, static_cast<float>(lowest), static_cast<float>(highest)};
    std::vector<float> units(s, s + rows);
    if (levels_per_scalar != resolution)
        for (float& unit : units) unit = unit / per_scalar * steps;
    (half ? quantize<BFloat16> : quantize<float>)(x, units.data(), rows, n, 1, grid, threads, out);
}

// The same for several tensors.
void qat_octav_and_quantize_all(int half, const void* parts, int64_t count, double k, int is_signed, double reach,
                                int iterations, double tolerance, int levels_per_scalar, int resolution, int lowest,
                                int highest, int warm, double momentum, int threads) {
    const Settings set{k, tolerance, iterations, !warm, static_cast<float>(reach), nullptr};
    const Levels grid{static_cast<float>(resolution), static_cast<float>(lowest), static_cast<float>(highest)};
    const Part* all = static_cast<const Part*>(parts);
    (half ? steps<BFloat16> : steps<float>)(all, count, set, is_signed, warm, static_cast<float>(levels_per_scalar), grid,
                                            threads);
    for (const Part* part = all; part < all + count; ++part)
        remember(part->s, part->rows, static_cast<float>(momentum), part->state_s, part->running_s, part->batches);
}

void qat_remember(const float* s, int64_t rows, double momentum, float* state_s, float* running_s, int64_t* batches) {
    remember(s, rows, static_cast<float>(momentum), state_s, running_s, batches);
}

void qat_octav_interval(int half, const void* x, int64_t rows, int64_t n, const float* start, double k, int iterations,
                        double tolerance, int threads, float* ends) {
    const Settings set{k, tolerance, iterations, start == nullptr, 1, nullptr};
    (half ? intervals<BFloat16> : intervals<float>)(x, rows, n, start, set, threads, ends);
}

void qat_fake_quantize_backward(int half, const void* grad, const void* x, const float* s, int64_t rows, int64_t n,
                                int parts, int is_signed, int mad, int threads, void* out) {
    const auto backward = half ? (mad ? quantize_backward<BFloat16, true> : quantize_backward<BFloat16, false>)
                               : (mad ? quantize_backward<float, true> : quantize_backward<float, false>);
    backward(grad, x, s, rows, n, parts, is_signed, threads, out);
}

// s: with `rounding`, full scales or clipping bounds; without it, clipping scalars. sums: shape of s.
void qat_learned_backward(int half, const void* grad, const void* x, const float* s, int64_t rows, int64_t n, int parts,
                          int resolution, int lowest, int highest, int is_signed, int rounding, int threads, void* out,
                          float* sums) {
    const Levels grid{static_cast<float>(resolution), static_cast<float>(lowest), static_cast<float>(highest)};
    const auto backward = half ? (rounding ? learned_backward<BFloat16, true> : learned_backward<BFloat16, false>)
                               : (rounding ? learned_backward<float, true> : learned_backward<float, false>);
    backward(grad, x, s, rows, n, parts, grid, is_signed, threads, out, sums);
}

void qat_fake_quantize_backward_all(int half, const void* parts, int64_t count, int is_signed, int mad, int threads) {
    const auto backward = half ? (mad ? quantize_backward_of_many<BFloat16, true> : quantize_backward_of_many<BFloat16, false>)
                               : (mad ? quantize_backward_of_many<float, true> : quantize_backward_of_many<float, false>);
    backward(static_cast<const GradientPart*>(parts), count, is_signed, threads);
}

}  // extern "C"
