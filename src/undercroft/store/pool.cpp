// A caching allocator for PyTorch's CPU tensors of 1 MiB and more; smaller ones go to the allocator it replaces.
//
// Why: glibc 2.36 never reuses the hole that an aligned block leaves for the next aligned block of the same size, so
// activations that come and go walk through the heap and keep several times their bytes resident; and giving those
// pages back costs a page fault each on the way in again. Here a freed block waits for the next request of its size,
// huge pages and all. Blocks that wait are bounded, and given back oldest first. A request that finds none of its size
// pushes out as many bytes of others, so that a step whose sizes differ from the last one's does not hold both.
//
// Invariants: `waiting_bytes` never exceeds `limit` after a call returns; bytes in use and waiting together never exceed
// the most ever in use by more than `kSlack`; every block is in exactly one place.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace {

constexpr size_t kSmallest = size_t{1} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kSlack = size_t{64} << 20;

struct Block {
  void* address;
  size_t nbytes;
};

class Pool {
 public:
  void* take(size_t nbytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    void* address = reuse(nbytes);
    if (address == nullptr) {
      if (waiting_bytes_ > kSlack) shrink(std::max(kSlack, waiting_bytes_ - std::min(waiting_bytes_, nbytes)));
      address = map(nbytes);
    }
    used_.emplace(address, nbytes);
    used_bytes_ += nbytes;
    if (used_bytes_ > peak_) peak_ = used_bytes_;
    return address;
  }

  // False if the address is not one of ours.
  bool give(void* address) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = used_.find(address);
    if (found == used_.end()) return false;
    size_t nbytes = found->second;
    used_.erase(found);
    used_bytes_ -= nbytes;
    waiting_.push_back({address, nbytes});
    by_size_.emplace(nbytes, std::prev(waiting_.end()));
    waiting_bytes_ += nbytes;
    shrink(limit_);
    return true;
  }

  size_t trim(size_t keep) {
    std::lock_guard<std::mutex> guard(mutex_);
    size_t before = waiting_bytes_;
    shrink(keep);
    return before - waiting_bytes_;
  }

  void set_limit(size_t limit) {
    std::lock_guard<std::mutex> guard(mutex_);
    limit_ = limit;
    shrink(limit);
  }

  void read(uint64_t out[3]) {
    std::lock_guard<std::mutex> guard(mutex_);
    out[0] = used_bytes_, out[1] = waiting_bytes_, out[2] = peak_;
    peak_ = used_bytes_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  using Waiting = std::list<Block>;

  void* reuse(size_t nbytes) {
    auto found = by_size_.find(nbytes);
    if (found == by_size_.end()) return nullptr;
    auto block = found->second;
    void* address = block->address;
    by_size_.erase(found);
    waiting_.erase(block);
    waiting_bytes_ -= nbytes;
    return address;
  }

  static void* map(size_t nbytes) {
    void* address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(address != MAP_FAILED, "not enough memory: you tried to allocate ", nbytes, " bytes.");
    madvise(address, nbytes, MADV_HUGEPAGE);
    return address;
  }

  // The oldest block goes first.
  void shrink(size_t keep) {
    while (waiting_bytes_ > keep) {
      auto oldest = waiting_.begin();
      auto range = by_size_.equal_range(oldest->nbytes);
      for (auto entry = range.first; entry != range.second; ++entry) {
        if (entry->second == oldest) {
          by_size_.erase(entry);
          break;
        }
      }
      munmap(oldest->address, oldest->nbytes);
      waiting_bytes_ -= oldest->nbytes;
      waiting_.erase(oldest);
    }
  }

  std::mutex mutex_;
  Waiting waiting_;
  std::unordered_multimap<size_t, Waiting::iterator> by_size_;
  std::unordered_map<void*, size_t> used_;
  size_t used_bytes_ = 0, waiting_bytes_ = 0, peak_ = 0, limit_ = kSlack;
};

// Never destroyed: tensors outlive static destructors.
Pool& pool() {
  static Pool* one = new Pool;
  return *one;
}

c10::Allocator* below = nullptr;

// Frees what either allocator gave: oneDNN frees raw pointers of any size through `raw_deleter`.
void release(void* address) {
  if (!pool().give(address)) below->raw_deleter()(address);
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes < kSmallest) return below->allocate(nbytes);
    void* address = pool().take((nbytes + kPage - 1) / kPage * kPage);
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
};

}  // namespace

extern "C" {

// Puts the pool in front of PyTorch's CPU allocator, once.
void undercroft_pool_install() {
  static std::once_flag once;
  std::call_once(once, [] {
    // A child forked while another thread holds the lock would wait for it for ever.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    below = c10::GetCPUAllocator();
    c10::SetCPUAllocator(new PoolAllocator, 0);
  });
}

size_t undercroft_pool_trim(size_t keep) { return pool().trim(keep); }
void undercroft_pool_set_limit(size_t limit) { pool().set_limit(limit); }

// Bytes in use, bytes waiting, and the most in use since the last call, in this order.
void undercroft_pool_read(uint64_t out[3]) { pool().read(out); }

}  // extern "C"
