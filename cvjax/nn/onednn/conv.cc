// The three products of a convolution by oneDNN, called by XLA on the CPU.
//
//   x       (y, kernel) -> x        the transpose with respect to the input
//   y       (x, kernel) -> y        the convolution itself
//   kernel  (x, y)      -> kernel   the transpose with respect to the kernel
//
// Images are NHWC and kernels HWIO, all dense; features are grouped in order, and a kernel
// has the channels of one group. An optional leading axis on all three arrays
// counts independent convolutions of one shape ("members").
//
// Threads are XLA's own: a product is cut into parts along members and batch, which the
// calling thread shares with whichever threads of XLA's pool are free; oneDNN runs each part on
// one thread. Large kernels' gradients are cut along features (`SliceKernel`). Without AVX-512
// oneDNN's kernels' gradients are slow, and made by matrix products instead (`AddUp`). How a
// product is cut, and the order in which the parts of a kernel's gradient are added up, depend on
// shapes and the size of the pool alone: results are equal bit for bit from run to run.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "dnnl.hpp"
#include "share.h"
#include "xla/ffi/api/ffi.h"

#if DNNL_CPU_RUNTIME == DNNL_RUNTIME_OMP
#include <omp.h>
#elif DNNL_CPU_RUNTIME == DNNL_RUNTIME_THREADPOOL
#include "dnnl_threadpool.hpp"
#endif

namespace ffi = xla::ffi;
using dnnl::memory;
using Tag = memory::format_tag;

namespace {

// Fewer multiply-accumulates than this are not worth a second thread.
constexpr int64_t kSmallest = 1 << 18;
// Kernel gradients are made in at most so many parts, each of which needs its own memory.
constexpr int64_t kMostKernelParts = 16;
// A slice of a kernel's gradient has a multiple of so many features: a vector register's.
constexpr int64_t kSlice = 16;
constexpr int64_t kPiece = 1 << 14;  // of a sum that threads share
constexpr size_t kMostPrimitives = 1024;

const dnnl::engine& Engine() {
  static const auto& engine = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& Stream() {
#if DNNL_CPU_RUNTIME == DNNL_RUNTIME_THREADPOOL
  thread_local dnnl::stream stream = dnnl::threadpool_interop::make_stream(Engine(), nullptr);
#else
  thread_local dnnl::stream stream(Engine());
#endif
  return stream;
}

// oneDNN works in the calling thread only, as long as this lives.
class OneThread {
 public:
#if DNNL_CPU_RUNTIME == DNNL_RUNTIME_OMP
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
#else
  OneThread() {}
#endif
};

// Memory of the calling thread, which grows and is kept.
std::byte* Scratch(int slot, size_t bytes) {
  struct Slot {
    std::unique_ptr<std::byte[]> memory;
    size_t size = 0;
  };
  thread_local std::array<Slot, 3> slots;
  Slot& own = slots[slot];
  if (own.size < bytes) {
    own.memory.reset(new std::byte[bytes + 64]);
    own.size = bytes;
  }
  auto address = reinterpret_cast<uintptr_t>(own.memory.get());
  return reinterpret_cast<std::byte*>((address + 63) / 64 * 64);
}

enum Wanted { kX, kY, kKernel };  // as ROLES in ../conv.py

struct Shape {
  int64_t batch, height, width, channels;        // x
  int64_t kernel_height, kernel_width;           // kernel
  int64_t out_height, out_width, features;       // y
  std::array<int64_t, 2> strides;
  std::array<int64_t, 4> padding;                // above, below, left, right
  int64_t groups;
  memory::data_type type;
  int64_t row;  // features of the whole y and kernel, of which `features` are a slice
};

// One of the products for one shape, ready to be executed.
struct Product {
  dnnl::primitive convolve;
  memory::desc x, kernel, y;      // kernel: as oneDNN likes it
  memory::desc plain_kernel;      // as XLA has it
  memory::desc scratch;
  std::optional<dnnl::reorder> pack;  // between the two kernels, if they differ

  std::string kernels;            // the name of what oneDNN has chosen

  bool packs() const { return pack.has_value(); }
};

Product Create(Wanted wanted, const Shape& s) {
  OneThread one_thread;
  const auto type = s.type;
  const auto sum_type = memory::data_type::f32;
  const memory::desc x({s.batch, s.channels, s.height, s.width}, type, Tag::nhwc);
  const memory::desc y({s.batch, s.features, s.out_height, s.out_width}, type, Tag::nhwc);
  memory::dims kernel_dims{s.features / s.groups, s.channels / s.groups, s.kernel_height,
                           s.kernel_width};
  if (s.groups > 1) kernel_dims.insert(kernel_dims.begin(), s.groups);
  // A kernel's gradient is added up in float32.
  const auto kernel_type = wanted == kKernel ? sum_type : type;
  const memory::desc any(kernel_dims, kernel_type, Tag::any);
  const memory::desc plain =
      s.groups > 1 ? memory::desc(kernel_dims, kernel_type, Tag::hwigo)
                   : memory::desc(kernel_dims, kernel_type,
                                  {1, s.row, s.kernel_width * s.channels * s.row,
                                   s.channels * s.row});
  const memory::dims strides{s.strides[0], s.strides[1]};
  const memory::dims low{s.padding[0], s.padding[2]}, high{s.padding[1], s.padding[3]};
  const auto algorithm = dnnl::algorithm::convolution_direct;
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);

  Product product;
  product.x = x;
  product.y = y;
  product.plain_kernel = plain;
  dnnl::convolution_forward::primitive_desc forward(
      Engine(),
      wanted == kY ? dnnl::prop_kind::forward_inference : dnnl::prop_kind::forward_training,
      algorithm, x, memory::desc(kernel_dims, type, Tag::any), y, strides, low, high, attr);
  if (wanted == kY) {
    product.convolve = dnnl::convolution_forward(forward);
    product.kernel = forward.weights_desc();
    product.scratch = forward.scratchpad_desc();
    product.kernels = forward.impl_info_str();
  } else if (wanted == kX) {
    dnnl::convolution_backward_data::primitive_desc backward(
        Engine(), algorithm, x, any, y, strides, low, high, forward, attr);
    product.convolve = dnnl::convolution_backward_data(backward);
    product.kernel = backward.weights_desc();
    product.scratch = backward.scratchpad_desc();
    product.kernels = backward.impl_info_str();
  } else {
    dnnl::convolution_backward_weights::primitive_desc backward(
        Engine(), algorithm, x, any, y, strides, low, high, forward, attr);
    product.convolve = dnnl::convolution_backward_weights(backward);
    product.kernel = backward.diff_weights_desc();
    product.scratch = backward.scratchpad_desc();
    product.kernels = backward.impl_info_str();
  }
  if (product.kernel != plain) {
    const bool back = wanted == kKernel;
    product.pack = dnnl::reorder(dnnl::reorder::primitive_desc(
        Engine(), back ? product.kernel : plain, Engine(), back ? plain : product.kernel));
  }
  return product;
}

// The products made last; making one takes as long as a small convolution.
std::shared_ptr<const Product> Find(Wanted wanted, const Shape& shape) {
  using Entry = std::pair<std::string, std::shared_ptr<const Product>>;
  static auto& mutex = *new std::mutex;
  static auto& latest = *new std::list<Entry>;
  static auto& places = *new std::unordered_map<std::string, std::list<Entry>::iterator>;
  std::string key(reinterpret_cast<const char*>(&shape), sizeof shape);
  key.push_back(static_cast<char>(wanted));
  {
    std::lock_guard lock(mutex);
    if (auto found = places.find(key); found != places.end()) {
      latest.splice(latest.begin(), latest, found->second);
      return found->second->second;
    }
  }
  auto product = std::make_shared<const Product>(Create(wanted, shape));
  std::lock_guard lock(mutex);
  if (places.count(key)) return places[key]->second;
  latest.emplace_front(key, product);
  places[key] = latest.begin();
  if (latest.size() > kMostPrimitives) {
    places.erase(latest.back().first);
    latest.pop_back();
  }
  return product;
}

memory At(const memory::desc& desc, const void* address) {
  return memory(desc, Engine(), const_cast<void*>(address));
}

void Execute(const Product& product, Wanted wanted, const void* x, const void* kernel,
             const void* y) {
  std::unordered_map<int, memory> arguments{
      {wanted == kX ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, At(product.x, x)},
      {wanted == kKernel ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS,
       At(product.kernel, kernel)},
      {wanted == kY ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, At(product.y, y)},
      {DNNL_ARG_SCRATCHPAD, At(product.scratch, Scratch(0, product.scratch.get_size()))}};
  product.convolve.execute(Stream(), arguments);
  Stream().wait();
}

void Reorder(const Product& product, const memory::desc& from, const void* in,
             const memory::desc& to, void* out) {
  auto source = At(from, in), target = At(to, out);
  product.pack->execute(Stream(), source, target);
  Stream().wait();
}

// Whether a kernel's gradient is made by `AddUp`.
bool AddsUp(Wanted wanted, const Shape& s) {
  static const bool is_wide =
      dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core;
  return wanted == kKernel && s.type == memory::data_type::f32 && s.groups == 1 && !is_wide;
}

// A kernel's gradient: what each of its positions saw of x, transposed, times y. Pieces of a
// few hundred pixels of y, with what was seen from them, stay in the cache.
void AddUp(const Shape& s, const float* x, const float* y, float* sum) {
  const int64_t row = s.kernel_width * s.channels, seen = s.kernel_height * row;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const int64_t piece = std::clamp<int64_t>((1 << 19) / seen, 64, 512);
  auto* store = reinterpret_cast<float*>(Scratch(0, 4 * seen * std::min(piece, pixels)));
  for (int64_t first = 0; first < pixels; first += piece) {
    const int64_t end = std::min(pixels, first + piece);
    float* to = store;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t column = pixel % s.out_width, line = pixel / s.out_width;
      const float* image = x + line / s.out_height * s.height * s.width * s.channels;
      const int64_t top = line % s.out_height * s.strides[0] - s.padding[0];
      const int64_t left = column * s.strides[1] - s.padding[2];
      const int64_t begin = std::clamp<int64_t>(-left, 0, s.kernel_width);
      const int64_t stop = std::clamp<int64_t>(s.width - left, begin, s.kernel_width);
      for (int64_t i = top; i < top + s.kernel_height; ++i, to += row) {
        if (i < 0 || i >= s.height || begin == stop) {
          std::fill_n(to, row, 0.f);
          continue;
        }
        std::fill(to, to + begin * s.channels, 0.f);
        std::copy_n(image + (i * s.width + left + begin) * s.channels,
                    (stop - begin) * s.channels, to + begin * s.channels);
        std::fill(to + stop * s.channels, to + row, 0.f);
      }
    }
    const float more = first ? 1.f : 0.f;
    dnnl::sgemm('T', 'N', seen, s.features, end - first, 1.f, store, seen,
                y + first * s.row, s.row, more, sum, s.row);
  }
}

// Kernels' gradients, each part for some of the features and all images: for a kernel that is
// larger than y, where sums of parts for some of the images would take as long as the parts.
void SliceKernel(ffi::ThreadPool& pool, int64_t threads, const Shape& shape, int64_t members,
                 int64_t parts, const float* x, float* kernel, const float* y) {
  Shape slice = shape;
  slice.features /= parts;
  const int64_t pixels = shape.batch * shape.out_height * shape.out_width;
  const int64_t x_size = shape.batch * shape.height * shape.width * shape.channels;
  const int64_t kernel_size =
      shape.kernel_height * shape.kernel_width * shape.channels * shape.features;
  const bool adds_up = AddsUp(kKernel, slice);
  const auto product = adds_up ? nullptr : Find(kKernel, slice);
  Share(pool, threads, members * parts, [&](int64_t number) {
    OneThread one_thread;
    const int64_t member = number / parts, first = number % parts * slice.features;
    const float* seen = x + member * x_size;
    const float* from = y + member * pixels * shape.features + first;
    float* to = kernel + member * kernel_size + first;
    if (adds_up) return AddUp(slice, seen, from, to);
    auto* own = reinterpret_cast<float*>(Scratch(1, 4 * pixels * slice.features));
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      std::copy_n(from + pixel * shape.row, slice.features, own + pixel * slice.features);
    void* sum = Scratch(2, product->kernel.get_size());
    Execute(*product, kKernel, seen, sum, own);
    Reorder(*product, product->kernel, sum, product->plain_kernel, to);
  });
}

uint16_t RoundToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::AnyBuffer first, ffi::AnyBuffer second,
                    ffi::Result<ffi::AnyBuffer> result, int64_t wanted_number,
                    ffi::Span<const int64_t> strides, ffi::Span<const int64_t> padding,
                    int64_t groups, int64_t most_threads) try {
  const auto wanted = static_cast<Wanted>(wanted_number);
  const ffi::AnyBuffer x_buffer = wanted == kX ? *result : first;
  const ffi::AnyBuffer kernel_buffer = wanted == kKernel ? *result : second;
  const ffi::AnyBuffer y_buffer =
      wanted == kY ? *result : (wanted == kX ? first : second);
  auto x_dims = x_buffer.dimensions(), kernel_dims = kernel_buffer.dimensions(),
       y_dims = y_buffer.dimensions();
  const size_t lead = x_dims.size() - 4;
  const int64_t members = lead ? x_dims[0] : 1;
  Shape shape{};
  shape.batch = x_dims[lead];
  shape.height = x_dims[lead + 1];
  shape.width = x_dims[lead + 2];
  shape.channels = x_dims[lead + 3];
  shape.kernel_height = kernel_dims[lead];
  shape.kernel_width = kernel_dims[lead + 1];
  shape.out_height = y_dims[lead + 1];
  shape.out_width = y_dims[lead + 2];
  shape.features = y_dims[lead + 3];
  std::copy(strides.begin(), strides.end(), shape.strides.begin());
  std::copy(padding.begin(), padding.end(), shape.padding.begin());
  shape.groups = groups;
  const bool is_float = x_buffer.element_type() == ffi::DataType::F32;
  shape.type = is_float ? memory::data_type::f32 : memory::data_type::bf16;
  shape.row = shape.features;
  const int64_t item = is_float ? 4 : 2;

  const int64_t x_size = shape.height * shape.width * shape.channels;
  const int64_t y_size = shape.out_height * shape.out_width * shape.features;
  const int64_t kernel_size =
      shape.kernel_height * shape.kernel_width * shape.channels / groups * shape.features;
  auto* x = static_cast<std::byte*>(x_buffer.untyped_data());
  auto* kernel = static_cast<std::byte*>(kernel_buffer.untyped_data());
  auto* y = static_cast<std::byte*>(y_buffer.untyped_data());

  // Parts for each member: of equal numbers of images, but for the last one.
  const int64_t threads = Threads(pool, most_threads);
  const int64_t macs = shape.batch * shape.out_height * shape.out_width * kernel_size;
  int64_t parts = std::min({(threads + members - 1) / members, shape.batch,
                            std::max<int64_t>(1, macs / kSmallest)});
  if (wanted == kKernel) parts = std::min(parts, kMostKernelParts);
  if (wanted == kKernel && is_float && groups == 1 && parts > 1 &&
      shape.features % (kSlice * parts) == 0 && shape.batch * y_size < kernel_size) {
    SliceKernel(pool, threads, shape, members, parts, reinterpret_cast<const float*>(x),
                reinterpret_cast<float*>(kernel), reinterpret_cast<const float*>(y));
    return ffi::Error::Success();
  }
  const int64_t images = (shape.batch + parts - 1) / parts;
  parts = (shape.batch + images - 1) / images;

  Shape whole = shape, rest = shape;
  whole.batch = images;
  rest.batch = shape.batch - (parts - 1) * images;
  const bool adds_up = AddsUp(wanted, shape);
  const auto usual = adds_up ? nullptr : Find(wanted, whole);
  const auto last = adds_up || rest.batch == images ? usual : Find(wanted, rest);
  OneThread one_thread;

  if (wanted != kKernel) {
    // Kernels are packed once, for all parts to read.
    const size_t packed = usual->packs() ? usual->kernel.get_size() : 0;
    const size_t packed_last = last->packs() && last != usual ? last->kernel.get_size() : 0;
    const size_t stride = (packed + packed_last + 63) / 64 * 64;
    std::byte* store = stride ? Scratch(1, stride * members) : nullptr;
    for (int64_t member = 0; member < members; ++member) {
      const std::byte* own = kernel + member * kernel_size * item;
      std::byte* place = store + member * stride;
      if (packed) Reorder(*usual, usual->plain_kernel, own, usual->kernel, place);
      if (packed_last)
        Reorder(*last, last->plain_kernel, own, last->kernel, place + packed);
    }
    Share(pool, threads, members * parts, [&](int64_t number) {
      OneThread one_thread;
      const int64_t member = number / parts, part = number % parts;
      const bool is_last = part == parts - 1;
      const Product& product = is_last ? *last : *usual;
      const int64_t image = member * shape.batch + part * images;
      const std::byte* own = kernel + member * kernel_size * item;
      if (product.packs())
        own = store + member * stride + (is_last && last != usual ? packed : 0);
      Execute(product, wanted, x + image * x_size * item, own, y + image * y_size * item);
    });
    return ffi::Error::Success();
  }

  // Each part makes its own sum, in float32; the first goes straight to the result.
  const bool is_direct = parts == 1 && is_float;
  float* sums = nullptr;
  if (!is_direct)
    sums = reinterpret_cast<float*>(Scratch(1, 4 * members * parts * kernel_size));
  Share(pool, threads, members * parts, [&](int64_t number) {
    OneThread one_thread;
    const int64_t member = number / parts, part = number % parts;
    const int64_t image = member * shape.batch + part * images;
    void* sum = is_direct ? static_cast<void*>(kernel + member * kernel_size * item)
                          : sums + number * kernel_size;
    if (adds_up) {
      AddUp(part == parts - 1 ? rest : whole,
            reinterpret_cast<const float*>(x) + image * x_size,
            reinterpret_cast<const float*>(y) + image * y_size, static_cast<float*>(sum));
      return;
    }
    const Product& product = part == parts - 1 ? *last : *usual;
    void* target = product.packs() ? Scratch(2, product.kernel.get_size()) : sum;
    Execute(product, kKernel, x + image * x_size * item, target, y + image * y_size * item);
    if (product.packs())
      Reorder(product, product.kernel, target, product.plain_kernel, sum);
  });
  if (is_direct) return ffi::Error::Success();
  const int64_t pieces = (kernel_size + kPiece - 1) / kPiece;
  Share(pool, threads, members * pieces, [&](int64_t number) {
    const int64_t member = number / pieces, begin = number % pieces * kPiece;
    const int64_t length = std::min(kPiece, kernel_size - begin);
    float* sum = sums + member * parts * kernel_size + begin;
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = sum + part * kernel_size;
      for (int64_t i = 0; i < length; ++i) sum[i] += more[i];
    }
    const int64_t place = member * kernel_size + begin;
    if (is_float) {
      std::copy_n(sum, length, reinterpret_cast<float*>(kernel) + place);
    } else {
      auto* out = reinterpret_cast<uint16_t*>(kernel) + place;
      for (int64_t i = 0; i < length; ++i) out[i] = RoundToBfloat16(sum[i]);
    }
  });
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
}

}  // namespace

// Whether oneDNN has fast kernels for a product on this machine.
//
// `sizes` are the integers of Shape, in its order.
extern "C" __attribute__((visibility("default"))) int cvjax_can_convolve(
    int64_t wanted, int64_t is_float, const int64_t* sizes) {
  Shape shape{};
  std::memcpy(&shape, sizes, offsetof(Shape, type));
  shape.row = shape.features;
  shape.type = is_float ? memory::data_type::f32 : memory::data_type::bf16;
  try {
    if (AddsUp(static_cast<Wanted>(wanted), shape)) return 1;
    return Find(static_cast<Wanted>(wanted), shape)->kernels.rfind("ref", 0) != 0;
  } catch (const std::exception&) {
    return 0;
  }
}

// Whether this processor has instructions for bfloat16 (AVX512_BF16 or AMX).
extern "C" __attribute__((visibility("default"))) int cvjax_has_bfloat16() {
  return dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core_bf16;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(cvjax_convolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("wanted")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("padding")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("most_threads"));
