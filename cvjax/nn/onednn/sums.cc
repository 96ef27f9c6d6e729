// Sums over images per channel, called by XLA on the CPU: of x, and of x times y.
//
// XLA's own loops convert a whole map to float32 before they add it up, and compute few
// channels one number at a time. Threads are XLA's own. The order of additions depends on
// shapes alone: results are equal bit for bit whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "share.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Compiled for several vector lengths, of which the processor takes its own at run time.
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace {

constexpr int64_t kLanes = 64;        // sums made side by side, at least
constexpr int64_t kRun = 128;         // terms of a sum in float32; then in double
constexpr int64_t kPart = 1 << 17;    // elements of a part, which one thread adds up

float Widen(float value) { return value; }

float Widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
inline __attribute__((always_inline)) void AddUpRows(const T* x, const T* y, int64_t rows,
                                                     int64_t channels, float* sum,
                                                     float* product, double* totals) {
  const int64_t pack = std::max<int64_t>(1, kLanes / channels), lanes = pack * channels;
  for (int64_t row = 0; row < rows;) {
    const int64_t end = std::min(rows, row + kRun * pack);
    std::fill_n(sum, lanes, 0.f);
    std::fill_n(product, lanes, 0.f);
    while (row < end) {
      const int64_t taken = std::min(pack, end - row);
      for (int64_t i = 0; i < taken * channels; ++i) {
        const float value = Widen(x[row * channels + i]);
        sum[i] += value;
        product[i] += value * Widen(y[row * channels + i]);
      }
      row += taken;
    }
    for (int64_t i = 0; i < lanes; ++i) {
      totals[i % channels] += sum[i];
      totals[channels + i % channels] += product[i];
    }
  }
}

WIDE void AddUp(const float* x, const float* y, int64_t rows, int64_t channels,
                float* __restrict sum, float* __restrict product, double* totals) {
  AddUpRows(x, y, rows, channels, sum, product, totals);
}

WIDE void AddUp(const uint16_t* x, const uint16_t* y, int64_t rows, int64_t channels,
                float* __restrict sum, float* __restrict product, double* totals) {
  AddUpRows(x, y, rows, channels, sum, product, totals);
}

ffi::Error Sums(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y,
                ffi::ResultBuffer<ffi::F32> sums, ffi::ResultBuffer<ffi::F32> products,
                int64_t lead, int64_t most_threads) try {
  const auto dims = x.dimensions();
  int64_t maps = 1, rows = 1;
  for (int64_t axis = 0; axis + 1 < static_cast<int64_t>(dims.size()); ++axis)
    (axis < lead ? maps : rows) *= dims[axis];
  const int64_t channels = dims.back();
  const int64_t size = std::max<int64_t>(1, kPart / channels);
  const int64_t parts = (rows + size - 1) / size;

  std::vector<double> totals(maps * parts * channels * 2);
  Share(pool, Threads(pool, most_threads), maps * parts, [&](int64_t number) {
    const int64_t map = number / parts, first = number % parts * size;
    const int64_t place = (map * rows + first) * channels;
    const int64_t count = std::min(size, rows - first);
    std::vector<float> store(2 * (kLanes + channels));
    float *sum = store.data(), *product = sum + kLanes + channels;
    double* own = totals.data() + number * channels * 2;
    if (x.element_type() == ffi::DataType::F32) {
      AddUp(static_cast<const float*>(x.untyped_data()) + place,
            static_cast<const float*>(y.untyped_data()) + place, count, channels, sum, product,
            own);
    } else {
      AddUp(static_cast<const uint16_t*>(x.untyped_data()) + place,
            static_cast<const uint16_t*>(y.untyped_data()) + place, count, channels, sum,
            product, own);
    }
  });
  for (int64_t map = 0; map < maps; ++map) {
    double* own = totals.data() + map * parts * channels * 2;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < 2 * channels; ++i) own[i] += own[part * channels * 2 + i];
    for (int64_t i = 0; i < channels; ++i) {
      sums->typed_data()[map * channels + i] = static_cast<float>(own[i]);
      products->typed_data()[map * channels + i] = static_cast<float>(own[channels + i]);
    }
  }
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return ffi::Error::Internal(std::string("sums per channel: ") + error.what());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cvjax_add_up, Sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("lead")
                                  .Attr<int64_t>("most_threads"));
