// A ggml accelerator device that computes FLASH_ATTN_EXT on the CPU; everything else stays with ggml's own backends.
//
// The structs of ggml's private header (ggml/src/ggml-backend-impl.h, API version 2) are declared here, since only public
// headers are installed. A ggml of another build than the one compiled against is left alone: ggml_backend_init
// says so, returns nothing, and stock llama.cpp runs.
#include "attention.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int API_VERSION = 2;

struct BackendFunctions {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void * async[5];
    void (*synchronize)(ggml_backend_t);
    void * plans[4];
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void * events[2];
    void * graph_optimize;
};

struct Backend {
    ggml_guid_t        guid;
    BackendFunctions   functions;
    ggml_backend_dev_t device;
    void *             context;
};

struct DeviceFunctions {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t *, size_t *);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    void * get_host_buffer_type;
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void *, size_t, size_t);
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    void * offload_op;
    void * events[3];
};

struct Device {
    DeviceFunctions    functions;
    ggml_backend_reg_t reg;
    void *             context;
};

struct RegFunctions {
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
    void * (*get_proc_address)(ggml_backend_reg_t, const char *);
};

struct Reg {
    int          api_version;
    RegFunctions functions;
    void *       context;
};

struct Context {
    int             n_threads = 1;
    edgekv::Scratch scratch;
};

std::atomic<int64_t> n_computed{0};

// Where the nodes that this thread computes add what each cached row gets.
struct Mass {
    float * rows;
    int64_t n_layers, n_rows;
};
thread_local Mass mass{};

const edgekv::Rows * rows_of(const ggml_tensor * x) { return edgekv::rows_of(static_cast<edgekv::Type>(x->type)); }

bool rows_contiguous(const ggml_tensor * x) { return x->nb[0] == ggml_type_size(x->type); }

bool computes(const ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT) return false;
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    float max_bias;
    std::memcpy(&max_bias, op->op_params + 1, sizeof max_bias);
    return max_bias == 0.0f && q->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && rows_of(k) && rows_of(v) &&
           rows_contiguous(q) && rows_contiguous(k) && rows_contiguous(v) && ggml_is_contiguous(op) &&
           k->ne[0] % ggml_blck_size(k->type) == 0 && v->ne[0] % ggml_blck_size(v->type) == 0 &&
           k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[0] >= k->ne[1])) &&
           (!sinks || sinks->type == GGML_TYPE_F32);
}

edgekv::View view(const ggml_tensor * x) {
    return x ? edgekv::View{static_cast<const char *>(x->data), x->nb[1], x->nb[2], x->nb[3]} : edgekv::View{};
}

// The layer's rows of the mass, by the name that llama.cpp gives its cache: cache_k_l7. Null: nobody wants it.
float * mass_of(const ggml_tensor * k) {
    if (!mass.rows || k->ne[3] != 1 || k->ne[1] > mass.n_rows) return nullptr;
    const char * name  = (k->view_src ? k->view_src : k)->name;
    const char * layer = std::strstr(name, "_l");
    const long   i     = layer ? std::strtol(layer + 2, nullptr, 10) : -1;
    return i >= 0 && i < mass.n_layers ? mass.rows + i * mass.n_rows : nullptr;
}

void compute(Context & context, ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    edgekv::Problem    p{};
    p.q          = view(q);
    p.k          = view(k);
    p.v          = view(v);
    p.mask       = view(mask);
    p.sinks      = sinks ? static_cast<const float *>(sinks->data) : nullptr;
    p.out        = static_cast<float *>(op->data);
    p.n_seq      = q->ne[3];
    p.n_heads    = q->ne[2];
    p.n_kv_heads = k->ne[2];
    p.n_tokens   = q->ne[1];
    p.n_rows     = k->ne[1];
    p.width_k    = k->ne[0];
    p.width_v    = v->ne[0];
    p.mask_heads = mask ? mask->ne[2] : 1;
    p.mask_seq   = mask ? mask->ne[3] : 1;
    p.rows_k     = rows_of(k);
    p.rows_v     = rows_of(v);
    // A latent's values are the first of the cached row that its keys are.
    p.shared = k->data == v->data && k->type == v->type && v->ne[0] <= k->ne[0] && k->nb[1] == v->nb[1] &&
               k->nb[2] == v->nb[2] && k->nb[3] == v->nb[3];
    p.mass = mass_of(k);
    std::memcpy(&p.scale, op->op_params, sizeof p.scale);
    std::memcpy(&p.softcap, op->op_params + 2, sizeof p.softcap);
    edgekv::attention(p, context.n_threads, context.scratch);
    n_computed.fetch_add(1, std::memory_order_relaxed);
}

// ---- backend ----

Backend * own(ggml_backend_t backend) { return reinterpret_cast<Backend *>(backend); }

const char * backend_name(ggml_backend_t) { return "EdgeKV"; }

void backend_free(ggml_backend_t backend) {
    delete static_cast<Context *>(own(backend)->context);
    delete own(backend);
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            if (node->op == GGML_OP_FLASH_ATTN_EXT && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0) {
                compute(*static_cast<Context *>(own(backend)->context), node);
            }
        }
    } catch (const std::exception &) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

void set_n_threads(ggml_backend_t backend, int n) {
    static_cast<Context *>(own(backend)->context)->n_threads = n < 1 ? 1 : n;
}

// ---- device ----

const char * device_name(ggml_backend_dev_t) { return "EdgeKV"; }

const char * device_description(ggml_backend_dev_t) { return "EdgeKV attention on the CPU"; }

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(device);
    props->description = device_description(device);
    props->type        = device_type(device);
    props->caps        = {false, false, true, false, true};
}

ggml_backend_t device_backend(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {0xed, 0x9e, 0x6b, 0x76, 0x1a, 0x2f, 0x4c, 0x0d, 0x8e, 0x57, 0x33, 0x90, 0xc4, 0x7d, 0x11, 0xab};
    auto *           made = new Backend{};
    made->guid                    = &guid;
    made->functions.get_name      = backend_name;
    made->functions.free          = backend_free;
    made->functions.graph_compute = backend_compute;
    made->device                  = device;
    made->context                 = new Context;
    return reinterpret_cast<ggml_backend_t>(made);
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

ggml_backend_buffer_t device_buffer_from_ptr(ggml_backend_dev_t, void * data, size_t size, size_t) {
    return ggml_backend_cpu_buffer_from_ptr(data, size);
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) { return computes(op); }

bool device_supports_buffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

// ---- registration ----

const char * reg_name(ggml_backend_reg_t) { return "EdgeKV"; }

size_t reg_device_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    static Device device = [reg] {
        Device made{};
        made.functions.get_name             = device_name;
        made.functions.get_description      = device_description;
        made.functions.get_memory           = device_memory;
        made.functions.get_type             = device_type;
        made.functions.get_props            = device_props;
        made.functions.init_backend         = device_backend;
        made.functions.get_buffer_type      = device_buffer_type;
        made.functions.buffer_from_host_ptr = device_buffer_from_ptr;
        made.functions.supports_op          = device_supports_op;
        made.functions.supports_buft        = device_supports_buffer;
        made.reg                            = reg;
        return made;
    }();
    return reinterpret_cast<ggml_backend_dev_t>(&device);
}

// From here on attention that llama.cpp computes on the calling thread adds the softmax weights which each cell of the cache
// gets, from all tokens and heads, to rows (layers, cells) float32; null: no longer.
void collect_mass(float * rows, int64_t n_layers, int64_t n_cells) { mass = {rows, n_layers, n_cells}; }

void * reg_function(ggml_backend_reg_t, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void *>(set_n_threads);
    if (std::strcmp(name, "edgekv_collect_mass") == 0) return reinterpret_cast<void *>(collect_mass);
    return nullptr;
}

// Whether the code at an address belongs to a file that uses the same copy of ggml as this library. A program that was
// linked with ggml holds one of its own, with another registry and other buffer types.
bool same_ggml(const void * code) {
    Dl_info where{};
    void *  file = dladdr(code, &where) ? dlopen(where.dli_fname, RTLD_NOW | RTLD_NOLOAD) : nullptr;
    if (!file) file = dlopen(nullptr, RTLD_NOW);  // the program itself
    const bool same = file && dlsym(file, "ggml_version") == reinterpret_cast<void *>(&ggml_version);
    if (file) dlclose(file);
    return same;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    if (std::strcmp(ggml_version(), EDGEKV_GGML_VERSION) != 0 || ggml_tensor_overhead() != EDGEKV_TENSOR_OVERHEAD) {
        std::fprintf(stderr, "EdgeKV's attention kernel was built for ggml %s and leaves this one, %s, alone\n", EDGEKV_GGML_VERSION,
                     ggml_version());
        return nullptr;
    }
    if (!same_ggml(__builtin_return_address(0))) {
        std::fputs("EdgeKV's attention kernel leaves this program alone: it holds a ggml of its own, where one in shared libraries is needed\n",
                   stderr);
        return nullptr;
    }
    static Reg reg = {API_VERSION, {reg_name, reg_device_count, reg_device, reg_function}, nullptr};
    return reinterpret_cast<ggml_backend_reg_t>(&reg);
}

// How rows of a ggml_type are multiplied: 1: keys as whole numbers, by queries that are rounded to 8 bits; 2: as bfloat16; or both.
__attribute__((visibility("default"))) int edgekv_rounding(int type) {
    const edgekv::Rows * rows = edgekv::rows_of(static_cast<edgekv::Type>(type));
    return rows ? edgekv::rounding(*rows) : 0;
}

// Attention nodes computed since the library was loaded: whether it is really used.
__attribute__((visibility("default"))) int64_t edgekv_n_computed(void) { return n_computed.load(std::memory_order_relaxed); }
}
