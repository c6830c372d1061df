// Put before every other kernel file. No header is included, so that NVRTC needs no include path.
typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL 0xffffffffu
#define NEG_INF __uint_as_float(0xff800000u)

// Tokens of a KV block: one warp reads a block at a time (attention.cu).
#define BLOCK 32

static __device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((u32)x << 16); }
static __device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
static __device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// Two floats to bf16, nearest even; `a` in the low half.
static __device__ __forceinline__ u32 pack(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
static __device__ __forceinline__ bf16 to_bf16(float a) { return (bf16)pack(a, 0.f); }

static __device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// d += a·b: a is 16×16 (rows × k), b is 16×8 (k × columns). With g = lane / 4 and t = lane % 4:
// a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8); b0 (2t, g), b1 (2t + 8, g); each a pair of
// neighbours in k. d0, d1 (g, 2t), (g, 2t + 1); d2, d3 the same of row g + 8.
static __device__ __forceinline__ void mma(float d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
    return x;
}

// A kernel may be launched while the one before it still runs (programmatic dependent launch). What that one writes is
// there after `wait_for_previous`, which every kernel calls before it reads or writes anything but weights;
// `let_next_start` says that all of this one is running.
static __device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes past the L1, which what is read once would only fill: of keys and values, some of which the same kernel writes.
static __device__ __forceinline__ uint4 load16(const void* p) {
    uint4 r;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
    return r;
}

// The same of weights, which nobody writes.
static __device__ __forceinline__ uint4 stream16(const void* p) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}
