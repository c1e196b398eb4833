/* Processes that load the library while they run, and processes that are forked: what tests/capi/programs.rs runs.
 *
 *   processes LIBRARY reload|fork
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pace_kernels.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define REQUIRE(condition)                                                       \
    do {                                                                         \
        if (!(condition)) {                                                      \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
            _exit(1);                                                            \
        }                                                                        \
    } while (0)

enum { ROWS = 64, IN = 96, OUT = 80, THREADS = 4 };

/* The library as it was loaded, and what this program uses of it. */
typedef struct {
    void *handle;
    __typeof__(pace_last_error) *last_error;
    __typeof__(pace_key) *key;
    __typeof__(pace_sigma_by_block) *sigma_by_block;
    __typeof__(pace_noisy_linear_forward) *forward;
    __typeof__(pace_set_threads) *set_threads;
    __typeof__(pace_set_blas) *set_blas;
    __typeof__(pace_set_openmp) *set_openmp;
} Library;

static void find(void *handle, const char *name, void *function) {
    void *symbol = dlsym(handle, name);
    REQUIRE(symbol);
    memcpy(function, &symbol, sizeof symbol);
}

static Library load(const char *path) {
    Library library = {0};
    library.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library.handle) fprintf(stderr, "%s\n", dlerror());
    REQUIRE(library.handle);
    find(library.handle, "pace_last_error", &library.last_error);
    find(library.handle, "pace_key", &library.key);
    find(library.handle, "pace_sigma_by_block", &library.sigma_by_block);
    find(library.handle, "pace_noisy_linear_forward", &library.forward);
    find(library.handle, "pace_set_threads", &library.set_threads);
    find(library.handle, "pace_set_blas", &library.set_blas);
    find(library.handle, "pace_set_openmp", &library.set_openmp);
    return library;
}

/* A layer under noise, large enough to be shared out among threads. Its result in `y`. */
static PaceStatus layer(const Library *library, float *y) {
    static float weight[OUT * IN], x[ROWS * IN];
    PaceNoisyLinear args = {0};
    args.size = sizeof args;
    args.dtype = PACE_F32;
    args.shape = (PaceShape){.branches = 2, .batch = ROWS, .tokens = 1, .in_features = IN, .out_features = OUT, .shared_input = 1};
    args.noise.kind = PACE_NOISE_GENERATED;
    args.noise.key = library->key(1, 2, 3);
    args.noise.sigma = 0.5f;
    args.delta_weight = (PaceTensor){weight, OUT * IN};
    args.x = (PaceTensor){x, ROWS * IN};
    args.y = (PaceTensor){y, 2 * ROWS * OUT};
    return library->forward(NULL, NULL, &args);
}

/* A wrong call, whose message is this thread's: it names the number. */
static void wrong(const Library *library, int number) {
    char expected[32];
    snprintf(expected, sizeof expected, "%d", number);
    REQUIRE(library->sigma_by_block(3, -1.0 * number, 0, NULL) == PACE_ERROR_VALUE);
    REQUIRE(strstr(library->last_error(), expected));
}

static atomic_int used, unloaded;

/* A thread that has used the library, and ends after it was closed. */
static void *user(void *library) {
    static _Thread_local float y[2 * ROWS * OUT];
    REQUIRE(layer(library, y) == PACE_OK);
    wrong(library, 77);
    atomic_fetch_add(&used, 1);
    while (!atomic_load(&unloaded)) usleep(100);
    return NULL;
}

/* What the child's `run` gives, within seconds. */
static int in_child(int (*run)(const Library *), const Library *library) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        alarm(10); /* The end of a process that hangs. */
        _exit(run(library));
    }
    int status;
    REQUIRE(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void *starter(void *library) {
    REQUIRE(((const Library *)library)->set_threads(2) == PACE_OK);
    return NULL;
}

/* Closed while its threads are starting, by a thread that has not used it. */
static int closes_at_once(const Library *library) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, starter, (void *)library) != 0 || pthread_join(thread, NULL) != 0) return 1;
    if (dlclose(library->handle) != 0) return 2;
    usleep(20000);
    return 0;
}

static void reload(const char *path) {
    for (int round = 0; round < 5; round++) {
        Library library = load(path);
        REQUIRE(in_child(closes_at_once, &library) == 0);
        REQUIRE(dlclose(library.handle) == 0);
    }
    for (int round = 0; round < 50; round++) {
        Library library = load(path);
        wrong(&library, round + 100);
        /* Every other round no operator runs, and no thread starts. */
        pthread_t threads[THREADS];
        const int count = round % 2 ? THREADS : 0;
        atomic_store(&used, 0);
        atomic_store(&unloaded, 0);
        for (int i = 0; i < count; i++) REQUIRE(pthread_create(&threads[i], NULL, user, &library) == 0);
        while (atomic_load(&used) < count) usleep(100);
        REQUIRE(dlclose(library.handle) == 0);
        atomic_store(&unloaded, 1);
        for (int i = 0; i < count; i++) REQUIRE(pthread_join(threads[i], NULL) == 0);
    }
    /* Its threads live on: the loader leaves their code where it is. */
    void *left = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    REQUIRE(left);
    dlclose(left);
    usleep(10000);
}

static atomic_int stop;

static void *worker(void *library) {
    static _Thread_local float y[2 * ROWS * OUT];
    while (!atomic_load(&stop)) REQUIRE(layer(library, y) == PACE_OK);
    return NULL;
}

static float from_child[2 * ROWS * OUT];

static int works(const Library *library) {
    return layer(library, from_child) == PACE_OK ? 0 : 1;
}

static int is_told(const Library *library) {
    const PaceStatus status = layer(library, from_child);
    if (status != PACE_ERROR_FORKED || !strstr(library->last_error(), "forked")) return 2;
    if (library->set_threads(2) != PACE_ERROR_FORKED) return 3;
    /* What needs no threads is there. */
    double sigma[3];
    if (library->sigma_by_block(3, 1.0, 0, sigma) != PACE_OK || sigma[0] != 1.0) return 4;
    wrong(library, 55);
    return 0;
}

static int is_told_in_the_second_generation(const Library *library) {
    return in_child(is_told, library);
}

static void forks(const char *path) {
    Library library = load(path);
    wrong(&library, 9);
    /* Before the first operator a child is like any process. */
    REQUIRE(in_child(works, &library) == 0);
    static float y[2 * ROWS * OUT];
    REQUIRE(layer(&library, y) == PACE_OK);
    REQUIRE(in_child(is_told, &library) == 0);
    REQUIRE(in_child(is_told_in_the_second_generation, &library) == 0);
    /* In the middle of operators of other threads. */
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) REQUIRE(pthread_create(&threads[i], NULL, worker, &library) == 0);
    for (int i = 0; i < 100; i++) REQUIRE(in_child(is_told, &library) == 0);
    atomic_store(&stop, 1);
    for (int i = 0; i < THREADS; i++) REQUIRE(pthread_join(threads[i], NULL) == 0);
    /* The parent goes on. */
    REQUIRE(layer(&library, y) == PACE_OK);
}

static atomic_int loops;

struct Job {
    void (*work)(void *data);
    void *data;
};

static void *member(void *job) {
    ((struct Job *)job)->work(((struct Job *)job)->data);
    return NULL;
}

/* GOMP_parallel, with a thread more than the calling one. */
static void parallel(void (*work)(void *data), void *data, unsigned threads, unsigned flags) {
    struct Job job = {work, data};
    pthread_t thread;
    REQUIRE(threads == 3 && flags == 0);
    atomic_fetch_add(&loops, 1);
    REQUIRE(pthread_create(&thread, NULL, member, &job) == 0);
    work(data);
    REQUIRE(pthread_join(thread, NULL) == 0);
}

static int works_without_openmp(const Library *library) {
    const int before = atomic_load(&loops);
    return works(library) || atomic_load(&loops) != before;
}

/* What a host registers: none, wrongly, and its threads, which a child does not have. */
static void registers(const char *path) {
    Library library = load(path);
    REQUIRE(library.set_blas(NULL, NULL, NULL) == PACE_ERROR_ARGUMENT);
    REQUIRE(library.set_openmp(NULL) == PACE_ERROR_ARGUMENT);
    REQUIRE(library.set_openmp(parallel) == PACE_OK);
    REQUIRE(library.set_openmp(parallel) == PACE_ERROR_ARGUMENT);
    REQUIRE(in_child(works_without_openmp, &library) == 0);
    REQUIRE(library.set_threads(3) == PACE_OK);
    static float y[2 * ROWS * OUT];
    REQUIRE(layer(&library, y) == PACE_OK && atomic_load(&loops) > 0);
    REQUIRE(in_child(is_told, &library) == 0);
}

int main(int count, char **arguments) {
    REQUIRE(count == 3);
    const char *what = arguments[2];
    (strcmp(what, "fork") == 0 ? forks : strcmp(what, "register") == 0 ? registers : reload)(arguments[1]);
    puts("done");
    return 0;
}
