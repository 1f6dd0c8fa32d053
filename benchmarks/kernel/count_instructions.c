// A QEMU TCG plug-in that says how many instructions an emulated program executed, on one thread. The functions are those of
// QEMU's include/qemu/qemu-plugin.h (API version 1), which Debian does not package.
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_info;
struct qemu_plugin_tb;
enum { INLINE_ADD_U64 = 0 };
typedef void (*tb_translated)(qemu_plugin_id_t, struct qemu_plugin_tb *);
void   qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_translated);
void   qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void * to, uint64_t amount);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void   qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);

int qemu_plugin_version = 1;

static uint64_t executed;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb * block) {
    (void) id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void ended(qemu_plugin_id_t id, void * nothing) {
    (void) id, (void) nothing;
    fprintf(stderr, "instructions %" PRIu64 "\n", executed);
}

int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info * info, int argc, char ** argv) {
    (void) info, (void) argc, (void) argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
