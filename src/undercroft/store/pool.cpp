// A caching allocator for PyTorch's CPU tensors of 1 MiB and more; smaller ones go to the allocator it replaces.
//
// Why: glibc 2.36 never reuses the hole that an aligned block leaves for the next aligned block of the same size, so
// activations that come and go walk through the heap and keep several times their bytes resident; and giving those
// pages back costs a page fault each on the way in again. Here a freed block waits for the next request of its size,
// huge pages and all. A request that finds none of its size is put together from huge pages of other blocks that wait,
// which the system moves by rewriting page tables: new ones would have to be cleared, which takes a hundred times as
// long. Only what is still missing is new.
//
// Invariants: bytes in use and waiting together never exceed the most ever in use by more than `kSlack`; every block is
// in exactly one place, and starts at a huge page if it holds one.

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
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlack = size_t{64} << 20;
// Each page that was moved may be a mapping of its own, of which a process has 65530 by default.
constexpr size_t kMostMoved = size_t{16384} * kHugePage;

// What lies beyond its last whole huge page is `mixed` if it was put together from several mappings, which cannot be
// moved at once.
struct Block {
  char* address;
  size_t nbytes;
  bool mixed = false;
};

// Address space without memory, at a huge page.
char* reserve(size_t nbytes) {
  size_t length = nbytes + kHugePage;
  void* found = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(found != MAP_FAILED, "not enough memory: you tried to allocate ", nbytes, " bytes.");
  char* start = static_cast<char*>(found);
  size_t before = -reinterpret_cast<uintptr_t>(start) % kHugePage;
  if (before != 0) munmap(start, before);
  munmap(start + before + nbytes, kHugePage - before);
  return start + before;
}

// New pages, which the system clears when they are touched.
bool populate(char* address, size_t nbytes) {
  void* found = mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (found == MAP_FAILED) return false;
  madvise(address, nbytes, MADV_HUGEPAGE);
  return true;
}

// Moves memory from the start of a block, at most `most` bytes: whole huge pages, or where that is less, what there is.
// Returns how many bytes were moved, 0 if the system refuses; then nobody knows what is mapped at the target.
size_t move_pages(Block& from, char* to, size_t most) {
  size_t unit = std::min({kHugePage, most, from.nbytes}), moved = 0;
  while (std::min(most - moved, from.nbytes) >= unit) {
    void* target = to + moved;
    if (mremap(from.address, unit, unit, MREMAP_MAYMOVE | MREMAP_FIXED, target) == MAP_FAILED) break;
    moved += unit;
    from.address += unit;
    from.nbytes -= unit;
  }
  return moved;
}

class Pool {
 public:
  void* take(size_t nbytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = by_size_.find(nbytes);
    Block block = found == by_size_.end() ? build(nbytes) : remove(found->second);
    used_.emplace(block.address, block);
    used_bytes_ += nbytes;
    if (used_bytes_ > peak_) peak_ = used_bytes_;
    return block.address;
  }

  // False if the address is not one of ours.
  bool give(void* address) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = used_.find(static_cast<char*>(address));
    if (found == used_.end()) return false;
    Block block = found->second;
    used_.erase(found);
    used_bytes_ -= block.nbytes;
    add(waiting_.end(), block);
    return true;
  }

  size_t trim(size_t keep) {
    std::lock_guard<std::mutex> guard(mutex_);
    size_t before = waiting_bytes_;
    shrink(keep);
    return before - waiting_bytes_;
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

  Block build(size_t nbytes) {
    Block block{reserve(nbytes), nbytes};
    size_t there = used_bytes_ + waiting_bytes_ < kMostMoved ? gather(block) : 0;
    size_t missing = nbytes - there;
    if (waiting_bytes_ > kSlack) shrink(std::max(kSlack, waiting_bytes_ - std::min(waiting_bytes_, missing)));
    if (missing != 0 && !populate(block.address + there, missing)) {
      munmap(block.address, nbytes);
      TORCH_CHECK(false, "not enough memory: you tried to allocate ", nbytes, " bytes.");
    }
    block.mixed |= 0 < missing && missing < nbytes % kHugePage;
    return block;
  }

  // Moves memory of waiting blocks to the start of one: huge pages as long as one is missing, the oldest block's first,
  // then what is left of others. Returns how many bytes there were.
  size_t gather(Block& to) {
    size_t gathered = 0;
    while (gathered < to.nbytes) {
      size_t missing = to.nbytes - gathered;
      bool is_whole = missing >= kHugePage;
      auto fits = [&](const Block& block) {
        return is_whole ? block.nbytes >= kHugePage : block.nbytes < kHugePage && !block.mixed;
      };
      auto oldest = std::find_if(waiting_.begin(), waiting_.end(), fits);
      if (oldest == waiting_.end()) break;
      Block block = remove(oldest);
      size_t moved = move_pages(block, to.address + gathered, missing);
      if (block.nbytes != 0) add(waiting_.begin(), block);
      if (moved == 0) return start_anew(to, gathered);
      to.mixed |= moved < missing && !is_whole;
      gathered += moved;
    }
    return gathered;
  }

  // Where a move failed: what was gathered goes back to the system, and the block is reserved elsewhere.
  size_t start_anew(Block& block, size_t gathered) {
    size_t unknown = std::min(kHugePage, block.nbytes - gathered);
    munmap(block.address, gathered);
    munmap(block.address + gathered + unknown, block.nbytes - gathered - unknown);
    block = {reserve(block.nbytes), block.nbytes};
    return 0;
  }

  void add(Waiting::iterator before, const Block& block) {
    by_size_.emplace(block.nbytes, waiting_.insert(before, block));
    waiting_bytes_ += block.nbytes;
  }

  Block remove(Waiting::iterator waiting) {
    auto range = by_size_.equal_range(waiting->nbytes);
    by_size_.erase(std::find_if(range.first, range.second, [&](auto& entry) { return entry.second == waiting; }));
    Block block = *waiting;
    waiting_bytes_ -= block.nbytes;
    waiting_.erase(waiting);
    return block;
  }

  // Gives memory back, the oldest block's first, in whole huge pages where there are any.
  void shrink(size_t keep) {
    while (waiting_bytes_ > keep) {
      size_t excess = waiting_bytes_ - keep;
      Block block = remove(waiting_.begin());
      size_t cut = std::min(block.nbytes, (excess + kHugePage - 1) / kHugePage * kHugePage);
      munmap(block.address, cut);
      if (cut < block.nbytes) add(waiting_.begin(), {block.address + cut, block.nbytes - cut, block.mixed});
    }
  }

  std::mutex mutex_;
  Waiting waiting_;
  std::unordered_multimap<size_t, Waiting::iterator> by_size_;
  std::unordered_map<char*, Block> used_;
  size_t used_bytes_ = 0, waiting_bytes_ = 0, peak_ = 0;
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

// Bytes in use, bytes waiting, and the most in use since the last call, in this order.
void undercroft_pool_read(uint64_t out[3]) { pool().read(out); }

}  // extern "C"
