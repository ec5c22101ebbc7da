// A saturated io_uring queue in one thread, by raw system calls: held by io_load.py against threads of pread/pwrite.
// It knows records by number only: record i lies at (i % records) * stride. One system call per record both submits it
// and collects what has completed. Invariant: a slot's memory is not touched between its submission and its completion.
// An experiment, not an engine: a short transfer is an error here. The ring belongs to the thread that opened it.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <vector>

namespace {
enum Source : uint32_t { kSlot, kWindow, kBounce };
constexpr uint64_t kPage = 4096;
struct Job {  // mirrored in io_load.py
    int32_t fd;
    uint32_t depth, is_write, is_fixed, source, source_count;
    uint64_t payload, stride, records;
    const uint64_t* slots;    // addresses of `depth` aligned buffers
    const uint64_t* sources;  // addresses of the tensors that kWindow and kBounce write
    uint64_t* moved;          // payload bytes completed; read by another thread
};

struct Mapping {
    void* address = MAP_FAILED;
    size_t nbytes = 0;
    void map(int fd, size_t length, uint64_t offset) {
        address = mmap(nullptr, nbytes = length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, off_t(offset));
    }
    bool ok() const { return address != MAP_FAILED; }
    template <class T> T* at(uint32_t offset) const { return reinterpret_cast<T*>(static_cast<char*>(address) + offset); }
    ~Mapping() { if (ok()) munmap(address, nbytes); }
};

class Ring {
  public:
    explicit Ring(const Job& job) : job_(job) {
        for (uint32_t slot = 0; slot < job.depth; ++slot) free_.push_back(slot);
    }
    ~Ring() { if (fd_ >= 0) close(fd_); }

    int open() {
        params_.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
        fd_ = static_cast<int>(syscall(SYS_io_uring_setup, job_.depth, &params_));
        if (fd_ < 0) return -errno;
        const size_t cq_end = params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe);
        const size_t sq_end = params_.sq_off.array + params_.sq_entries * sizeof(uint32_t);
        rings_.map(fd_, std::max(cq_end, sq_end), IORING_OFF_SQ_RING);
        entries_.map(fd_, params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
        if (!rings_.ok() || !entries_.ok()) return -ENOMEM;
        return job_.is_fixed ? register_slots() : 0;
    }

    // Submits the next record; with the queue full, returns only once a record has completed.
    int step() {
        const uint32_t slot = free_.back();
        free_.pop_back();
        prepare(slot, next_record_++);
        return enter(1, free_.empty() ? 1 : 0);
    }

    int drain() {
        int error = 0;
        while (free_.size() < job_.depth && !error) error = enter(0, 1);
        return error;
    }

  private:
    int register_slots() {
        std::vector<iovec> vectors;
        for (uint32_t i = 0; i < job_.depth; ++i) vectors.push_back({reinterpret_cast<void*>(job_.slots[i]), job_.payload});
        return syscall(SYS_io_uring_register, fd_, IORING_REGISTER_BUFFERS, vectors.data(), vectors.size()) ? -errno : 0;
    }

    void prepare(uint32_t slot, uint64_t record) {
        const uint64_t source = job_.source == kSlot ? 0 : job_.sources[record % job_.source_count];
        const uint64_t address = job_.source == kWindow ? source & ~(kPage - 1) : job_.slots[slot];
        if (job_.source == kBounce) std::memcpy((void*)address, (const void*)source, job_.payload);
        std::atomic_ref<uint32_t> tail(*rings_.at<uint32_t>(params_.sq_off.tail));
        const uint32_t index = tail.load(std::memory_order_relaxed) & (params_.sq_entries - 1);
        io_uring_sqe& entry = entries_.at<io_uring_sqe>(0)[index] = {};
        constexpr uint8_t opcodes[] = {IORING_OP_READ, IORING_OP_READ_FIXED, IORING_OP_WRITE, IORING_OP_WRITE_FIXED};
        entry.opcode = opcodes[2 * job_.is_write + job_.is_fixed];
        entry.fd = job_.fd;
        entry.addr = address;
        entry.len = static_cast<uint32_t>(nbytes());
        entry.off = record % job_.records * job_.stride;
        entry.buf_index = static_cast<uint16_t>(slot);
        entry.user_data = slot;
        rings_.at<uint32_t>(params_.sq_off.array)[index] = index;
        tail.fetch_add(1, std::memory_order_release);
    }

    int enter(unsigned submit, unsigned wanted) {
        long rc;
        do rc = syscall(SYS_io_uring_enter, fd_, submit, wanted, IORING_ENTER_GETEVENTS, nullptr, 0);
        while (rc < 0 && errno == EINTR);
        return rc < 0 ? -errno : reap();
    }

    int reap() {
        int error = 0;
        std::atomic_ref<uint32_t> head(*rings_.at<uint32_t>(params_.cq_off.head));
        std::atomic_ref<uint32_t> tail(*rings_.at<uint32_t>(params_.cq_off.tail));
        uint32_t at = head.load(std::memory_order_relaxed);
        for (; at != tail.load(std::memory_order_acquire); ++at) {
            const io_uring_cqe& done = rings_.at<io_uring_cqe>(params_.cq_off.cqes)[at & (params_.cq_entries - 1)];
            if (done.res != static_cast<int32_t>(nbytes())) error = done.res < 0 ? done.res : -EIO;
            else std::atomic_ref<uint64_t>(*job_.moved).fetch_add(job_.payload, std::memory_order_relaxed);
            free_.push_back(static_cast<uint32_t>(done.user_data));
        }
        head.store(at, std::memory_order_release);
        return error;
    }

    uint64_t nbytes() const { return job_.source == kWindow ? job_.stride : job_.payload; }

    Job job_;
    io_uring_params params_{};
    int fd_ = -1;
    Mapping rings_, entries_;
    std::vector<uint32_t> free_;
    uint64_t next_record_ = 0;
};
}  // namespace

extern "C" {
Ring* uring_open(const Job* job, int* error) {
    Ring* ring = new Ring(*job);
    *error = ring->open();
    return ring;
}
int uring_step(Ring* ring) { return ring->step(); }
int uring_run(Ring* ring, const volatile int32_t* stop) {
    int error = 0;
    while (!*stop && !error) error = ring->step();
    return error;
}
int uring_close(Ring* ring) {
    const int error = ring->drain();
    delete ring;
    return error;
}
}
