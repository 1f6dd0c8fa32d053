/* Which kernels a card spends its time in, of any process, CUDA graphs included:
 *
 *     CUDA_INJECTION64_PATH=libkernel_times.so KERNEL_TIMES=FOLDER COMMAND
 *
 * The driver loads this library into every process that uses the card. Four times a second it writes a table of the
 * kernels of the last WINDOW_NS before the newest one, as FOLDER/PID-NUMBER.tsv: first the window's length and the
 * time in which a kernel ran, then each kernel's launches, time and name. Needs CUPTI (the toolkit's, or that of PyTorch's
 * wheels); benchmarks/cuda/run.sh builds it.
 */
#include <cupti.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define WINDOW_NS 100000000ull
#define BUFFER_BYTES (4u << 20)
#define RING (1u << 17) /* a token is a few hundred kernels, a window fewer than 100,000 */
#define NAMES 1024

typedef struct {
    uint64_t start, end;
    const char *name; /* CUPTI's own, the same pointer for the same kernel */
} Run;

typedef struct {
    const char *name;
    uint64_t launches, ns;
} Row;

static Run ring[RING];
static uint64_t seen, newest;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *records) {
    *buffer = aligned_alloc(8, BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *records = 0; /* as many as fit */
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    pthread_mutex_lock(&lock);
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
        const KERNEL_RECORD *kernel = (const KERNEL_RECORD *)record;
        ring[seen++ % RING] = (Run){kernel->start, kernel->end, kernel->name};
        if (kernel->end > newest) newest = kernel->end;
    }
    pthread_mutex_unlock(&lock);
    free(buffer);
}

static int by_start(const void *a, const void *b) {
    uint64_t x = ((const Run *)a)->start, y = ((const Run *)b)->start;
    return (x > y) - (x < y);
}

static int by_time(const void *a, const void *b) {
    uint64_t x = ((const Row *)a)->ns, y = ((const Row *)b)->ns;
    return (x < y) - (x > y);
}

static void write_table(const char *folder, unsigned number) {
    static Run runs[RING];
    static Row rows[NAMES];
    size_t n_runs = 0, n_rows = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < (seen < RING ? seen : RING); i++)
        if (ring[i].start + WINDOW_NS > newest) runs[n_runs++] = ring[i];
    pthread_mutex_unlock(&lock);
    if (!n_runs) return;
    qsort(runs, n_runs, sizeof *runs, by_start);
    uint64_t busy = 0, until = runs[0].start;
    for (size_t i = 0; i < n_runs; i++) {
        if (runs[i].end > until) {
            busy += runs[i].end - (runs[i].start > until ? runs[i].start : until);
            until = runs[i].end;
        }
        size_t row = 0;
        while (row < n_rows && rows[row].name != runs[i].name) row++;
        if (row == NAMES) continue;
        if (row == n_rows) rows[n_rows++] = (Row){runs[i].name, 0, 0};
        rows[row].launches++, rows[row].ns += runs[i].end - runs[i].start;
    }
    qsort(rows, n_rows, sizeof *rows, by_time);
    char path[4096];
    snprintf(path, sizeof path, "%s/%d-%05u.tsv", folder, (int)getpid(), number);
    FILE *file = fopen(path, "w");
    if (!file) return;
    fprintf(file, "window_ns\t%" PRIu64 "\nbusy_ns\t%" PRIu64 "\n", until - runs[0].start, busy);
    for (size_t i = 0; i < n_rows; i++)
        fprintf(file, "%" PRIu64 "\t%" PRIu64 "\t%s\n", rows[i].launches, rows[i].ns, rows[i].name);
    fclose(file);
}

static void *watch(void *folder) {
    uint64_t before = 0;
    for (unsigned number = 0;; number++) {
        usleep(250000);
        cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
        if (seen != before) write_table(folder, number);
        before = seen;
    }
    return NULL;
}

int InitializeInjection(void) {
    pthread_t thread;
    char *folder = getenv("KERNEL_TIMES");
    if (!folder) return 1;
    if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS ||
        pthread_create(&thread, NULL, watch, folder))
        fprintf(stderr, "kernel_times: CUPTI refused\n");
    return 1;
}
