/* libcuda.so.1 without a GPU: the calls of CUDA's driver that the project makes, over host memory.
 *
 *     reserve   mmap(PROT_NONE)     what is not mapped and accessible faults: SIGSEGV
 *     create    a piece of a memfd  holds NaNs until it is written to: CUDA does not promise zeros
 *     map       an entry in a list  set access: mmap(MAP_FIXED) of the piece; unmap: PROT_NONE again
 *
 * It checks what the driver's documentation demands, and refuses the rest; work in a stream is done at once. A test
 * makes the n-th call from now on fail (`shim_fail`) and reads what is alive (`shim_live`).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, CONTEXT_IS_DESTROYED = 709, UNKNOWN = 999 };
enum { MANY = 1 << 16 };
typedef uint64_t Address;
typedef struct { int type, handle_types, location_type, location_id; void *win32; unsigned char flags[8]; } Properties;
typedef struct { int location_type, location_id, flags; } Access;
typedef struct Memory { uint64_t offset, size; int released, mappings, written; } Memory;   /* made by cuMemCreate */
typedef struct { Address base; uint64_t size; Memory *memory; int accessible; } Piece;      /* of addresses */
typedef struct { Piece at[MANY]; int count; } List;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static List reservations, mappings, allocations; /* the last: cuMemAlloc, cuMemHostAlloc */
static int fd, initialized, retained, handles, objects; /* objects: streams and events */
static uint64_t granularity = 2 << 20, total = (uint64_t)4 << 30, taken, end_of_file, generation, calls;
static __thread uint64_t current; /* generation of the context that is current in this thread */

/* ---- what tests tell and ask ---- */

static struct { char function[64]; uint64_t after; int result; } failure;
static char failed[64];

/* The call of `function` (of any, if empty) after `after` more of them returns `result`, once, and does nothing. */
void shim_fail(const char *function, uint64_t after, int result) {
    snprintf(failure.function, sizeof failure.function, "%s", function);
    failure.after = after, failure.result = result, failed[0] = 0;
}
const char *shim_failed(void) { return failed; } /* the function that was made to fail; empty: not yet */
uint64_t shim_calls(void) { return calls; }      /* so far, all together */
void shim_sizes(uint64_t of_a_page_group, uint64_t of_the_gpu) { granularity = of_a_page_group, total = of_the_gpu; }
/* Reservations, handles, mappings, accessible mappings, allocations, streams and events, contexts, bytes taken. */
void shim_live(uint64_t out[8]) {
    uint64_t accessible = 0;
    for (int i = 0; i < mappings.count; i++) accessible += mappings.at[i].accessible;
    uint64_t live[] = {reservations.count, handles, mappings.count, accessible, allocations.count, objects, retained, taken};
    memcpy(out, live, sizeof live);
}

static int told_to_fail(const char *function) {
    calls++;
    if (!failure.result || (failure.function[0] && strcmp(failure.function, function)) || failure.after--) return SUCCESS;
    int result = failure.result;
    snprintf(failed, sizeof failed, "%s", function);
    failure.result = 0;
    return result;
}

static void unlock(pthread_mutex_t **held) { pthread_mutex_unlock(*held); }

#define REQUIRE(holds, otherwise) do { if (!(holds)) return otherwise; } while (0)
#define LOCKED __attribute__((cleanup(unlock), unused)) pthread_mutex_t *held = (pthread_mutex_lock(&lock), &lock)
#define CALL \
    LOCKED; \
    do { int result = told_to_fail(__func__); REQUIRE(!result, result); } while (0); \
    REQUIRE(initialized == getpid(), NOT_INITIALIZED) /* a process that was forked from it has no GPU */
#define CALL_IN_CONTEXT \
    CALL; \
    REQUIRE(current, INVALID_CONTEXT); \
    REQUIRE(current == generation && retained, CONTEXT_IS_DESTROYED)

/* ---- lists ---- */

static Piece *add(List *list, Address base, uint64_t size, Memory *memory) {
    if (list->count == MANY) abort();
    list->at[list->count] = (Piece){base, size, memory, 0};
    return &list->at[list->count++];
}
static void drop(List *list, Piece *piece) { *piece = list->at[--list->count]; }
/* The piece that holds [base, base + size), or NULL. */
static Piece *around(List *list, Address base, uint64_t size) {
    for (int i = 0; i < list->count; i++)
        if (list->at[i].base <= base && base + size <= list->at[i].base + list->at[i].size) return &list->at[i];
    return NULL;
}
static int overlaps(List *list, Address base, uint64_t size) {
    for (int i = 0; i < list->count; i++)
        if (list->at[i].base < base + size && base < list->at[i].base + list->at[i].size) return 1;
    return 0;
}
/* Whether whole mappings, one behind the other, make up [base, base + size). */
static int whole(Address base, uint64_t size) {
    Address at = base;
    for (Piece *p; at < base + size && (p = around(&mappings, at, 1)) && p->base == at;) at += p->size;
    return size > 0 && at == base + size;
}
/* Whether a copy may touch this: mapped and accessible, allocated, or the host's. */
static int touchable(Address base, uint64_t size) {
    if (!overlaps(&reservations, base, size)) return base != 0;
    Address at = base;
    for (Piece *p; at < base + size && (p = around(&mappings, at, 1)) && p->accessible;) at = p->base + p->size;
    return at >= base + size;
}
static int hide(Address base, uint64_t size) {
    void *at = mmap((void *)base, size, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
static void forget(Memory *memory) { /* it lives as long as a handle or a mapping refers to it */
    if (!memory->released || memory->mappings) return;
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, memory->offset, memory->size);
    taken -= memory->size;
    memory->size = 0; /* never freed: a handle that is used after its release is refused, not followed */
}

/* ---- devices and contexts ---- */

int cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    int result = told_to_fail(__func__);
    if (!result && !initialized) fd = memfd_create("cuda-shim", 0), initialized = getpid();
    if (!result && initialized != getpid()) result = NOT_INITIALIZED;
    pthread_mutex_unlock(&lock);
    return result ? result : flags ? INVALID_VALUE : SUCCESS;
}
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { CALL; return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { CALL; REQUIRE(ordinal == 0, INVALID_DEVICE); return *device = 0, SUCCESS; }
int cuDeviceGetName(char *name, int room, int device) {
    CALL; REQUIRE(device == 0, INVALID_DEVICE); return snprintf(name, room, "a shim of CUDA's driver"), SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { CALL; REQUIRE(!device, INVALID_DEVICE); return *bytes = total, SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL;
    REQUIRE(device == 0, INVALID_DEVICE);
    *value = attribute == 16 ? 4       /* multiprocessors */
             : attribute == 75 ? 9     /* compute capability 9.0 */
             : attribute == 102 ? 1    /* virtual memory management */
             : 0;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    CALL;
    REQUIRE(device == 0, INVALID_DEVICE);
    generation += !retained++;
    return *context = (void *)generation, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    CALL; REQUIRE(device == 0, INVALID_DEVICE); REQUIRE(retained > 0, INVALID_CONTEXT); return retained--, SUCCESS;
}
int cuCtxSetCurrent(void *context) {
    CALL;
    REQUIRE(!context || ((uint64_t)context == generation && retained), INVALID_CONTEXT);
    return current = (uint64_t)context, SUCCESS;
}
int cuCtxGetCurrent(void **context) { CALL; return *context = (void *)current, SUCCESS; }
int cuCtxSynchronize(void) { CALL_IN_CONTEXT; return SUCCESS; }

/* ---- virtual memory ---- */

int cuMemGetInfo_v2(size_t *free, size_t *all) { CALL_IN_CONTEXT; return *free = total - taken, *all = total, SUCCESS; }
int cuMemGetAllocationGranularity(size_t *bytes, const Properties *properties, int option) {
    CALL;
    REQUIRE(properties->type == 1 && properties->location_type == 1 && (option == 0 || option == 1), INVALID_VALUE);
    return *bytes = granularity, SUCCESS;
}
int cuMemAddressReserve(Address *base, size_t size, size_t alignment, Address hint, unsigned long long flags) {
    CALL_IN_CONTEXT;
    REQUIRE(size && size % granularity == 0 && !(alignment & (alignment - 1)) && !hint && !flags, INVALID_VALUE);
    uint64_t step = alignment < granularity ? granularity : alignment;
    void *got = mmap(NULL, size + step, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(got != MAP_FAILED, OUT_OF_MEMORY);
    Address start = (Address)got, aligned = (start + step - 1) / step * step;
    if (aligned > start) munmap(got, aligned - start);
    if (start + step > aligned) munmap((void *)(aligned + size), start + step - aligned);
    add(&reservations, aligned, size, NULL);
    return *base = aligned, SUCCESS;
}
int cuMemAddressFree(Address base, size_t size) {
    CALL_IN_CONTEXT;
    Piece *piece = around(&reservations, base, size);
    REQUIRE(piece && piece->base == base && piece->size == size && !overlaps(&mappings, base, size), INVALID_VALUE);
    drop(&reservations, piece);
    return munmap((void *)base, size) ? UNKNOWN : SUCCESS;
}
int cuMemCreate(Memory **handle, size_t size, const Properties *properties, unsigned long long flags) {
    CALL_IN_CONTEXT;
    REQUIRE(size && size % granularity == 0 && !flags, INVALID_VALUE);
    REQUIRE(properties->type == 1 && properties->location_type == 1, INVALID_VALUE);
    REQUIRE(properties->location_id == 0, INVALID_DEVICE);
    REQUIRE(size <= total - taken && !ftruncate(fd, end_of_file + size), OUT_OF_MEMORY);
    *handle = malloc(sizeof(Memory));
    **handle = (Memory){end_of_file, size, 0, 0, 0};
    return end_of_file += size, taken += size, handles++, SUCCESS;
}
int cuMemRelease(Memory *memory) {
    CALL_IN_CONTEXT;
    REQUIRE(memory && !memory->released, INVALID_VALUE);
    memory->released = 1, handles--;
    return forget(memory), SUCCESS;
}
int cuMemMap(Address base, size_t size, size_t offset, Memory *memory, unsigned long long flags) {
    CALL_IN_CONTEXT;
    REQUIRE(size && base % granularity == 0 && size % granularity == 0 && !offset && !flags, INVALID_VALUE);
    REQUIRE(memory && !memory->released && size == memory->size, INVALID_VALUE);
    REQUIRE(around(&reservations, base, size) && !overlaps(&mappings, base, size), INVALID_VALUE);
    add(&mappings, base, size, memory);
    return memory->mappings++, SUCCESS;
}
int cuMemSetAccess(Address base, size_t size, const Access *access, size_t count) {
    CALL_IN_CONTEXT;
    REQUIRE(count == 1 && access->location_type == 1 && access->location_id == 0 && access->flags == 3, INVALID_VALUE);
    REQUIRE(whole(base, size), INVALID_VALUE);
    for (Address at = base; at < base + size;) {
        Piece *piece = around(&mappings, at, 1);
        Memory *memory = piece->memory;
        void *got = mmap((void *)at, piece->size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED, fd, memory->offset);
        REQUIRE(got != MAP_FAILED, OUT_OF_MEMORY);
        if (!memory->written) memset(got, 0xff, piece->size), memory->written = 1; /* NaNs, for all we know */
        piece->accessible = 1;
        at += piece->size;
    }
    return SUCCESS;
}
int cuMemUnmap(Address base, size_t size) {
    CALL_IN_CONTEXT;
    REQUIRE(whole(base, size), INVALID_VALUE);
    REQUIRE(!hide(base, size), OUT_OF_MEMORY);
    for (Address at = base; at < base + size;) {
        Piece *piece = around(&mappings, at, 1);
        Memory *memory = piece->memory;
        at += piece->size;
        memory->mappings--;
        drop(&mappings, piece);
        forget(memory);
    }
    return SUCCESS;
}
/* What Triton's launcher asks of every pointer that it is handed. */
int cuPointerGetAttribute(void *data, int attribute, Address pointer) {
    CALL_IN_CONTEXT;
    REQUIRE(around(&mappings, pointer, 1) || around(&allocations, pointer, 1), INVALID_VALUE);
    REQUIRE(attribute == 3, INVALID_VALUE); /* the device pointer; no other attribute is asked for */
    return *(Address *)data = pointer, SUCCESS;
}
int shim_reserved(Address pointer) { return around(&reservations, pointer, 1) != NULL; }

/* ---- allocations, copies ---- */

static int allocate(Address *base, size_t size) {
    REQUIRE(size && size <= total - taken, size ? OUT_OF_MEMORY : INVALID_VALUE);
    REQUIRE(!posix_memalign((void **)base, 512, size), OUT_OF_MEMORY);
    add(&allocations, *base, size, NULL);
    return memset((void *)*base, 0xff, size), SUCCESS;
}
static int deallocate(Address base) {
    Piece *piece = around(&allocations, base, 1);
    REQUIRE(piece && piece->base == base, INVALID_VALUE);
    return drop(&allocations, piece), free((void *)base), SUCCESS;
}
int cuMemAlloc_v2(Address *base, size_t size) { CALL_IN_CONTEXT; return allocate(base, size); }
int cuMemFree_v2(Address base) { LOCKED; return deallocate(base); } /* torch's own, and its errors: not made to fail */
int cuMemHostAlloc(Address *base, size_t size, unsigned flags) { CALL_IN_CONTEXT; return flags > 7 ? INVALID_VALUE : allocate(base, size); }
int cuMemFreeHost(Address base) { LOCKED; return deallocate(base); }
int cuMemcpyAsync(Address target, Address source, size_t size, void *stream) {
    CALL_IN_CONTEXT;
    REQUIRE(touchable(target, size) && touchable(source, size), INVALID_VALUE);
    return memmove((void *)target, (void *)source, size), SUCCESS;
}
int cuMemsetD8_v2(Address base, unsigned char value, size_t size) {
    CALL_IN_CONTEXT;
    REQUIRE(size && (around(&allocations, base, size) || overlaps(&reservations, base, size)), INVALID_VALUE);
    REQUIRE(touchable(base, size), INVALID_VALUE);
    return memset((void *)base, value, size), SUCCESS;
}

/* ---- streams and events: everything has run when it returns ---- */

typedef struct { struct timespec at; int recorded; } Event;
static int make(void **object) { *object = calloc(1, sizeof(Event)); return objects++, SUCCESS; }
static int unmake(void *object) { REQUIRE(object, INVALID_HANDLE); return free(object), objects--, SUCCESS; }
int cuStreamCreate(void **stream, unsigned flags) { CALL_IN_CONTEXT; return flags > 1 ? INVALID_VALUE : make(stream); }
int cuStreamDestroy_v2(void *stream) { LOCKED; return unmake(stream); }
int cuStreamSynchronize(void *stream) { CALL_IN_CONTEXT; return SUCCESS; }
int cuEventCreate(void **event, unsigned flags) { CALL_IN_CONTEXT; return flags > 7 ? INVALID_VALUE : make(event); }
int cuEventDestroy_v2(void *event) { LOCKED; return unmake(event); }
int cuEventRecord(Event *event, void *stream) {
    CALL_IN_CONTEXT;
    REQUIRE(event, INVALID_HANDLE);
    return event->recorded = 1, clock_gettime(CLOCK_MONOTONIC, &event->at), SUCCESS;
}
int cuEventSynchronize(Event *event) { CALL_IN_CONTEXT; return event ? SUCCESS : INVALID_HANDLE; }
int cuEventQuery(Event *event) { CALL_IN_CONTEXT; return event ? SUCCESS : INVALID_HANDLE; }
int cuEventElapsedTime_v2(float *ms, Event *first, Event *last) {
    CALL_IN_CONTEXT;
    REQUIRE(first && last && first->recorded && last->recorded, INVALID_HANDLE);
    *ms = 1e3 * (last->at.tv_sec - first->at.tv_sec) + 1e-6 * (last->at.tv_nsec - first->at.tv_nsec);
    return SUCCESS;
}

/* ---- how the bindings find all this ---- */

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    Dl_info here;
    dladdr((void *)shim_fail, &here);
    void *library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(library, newer);
    if (!*function) *function = dlsym(library, name);
    dlclose(library);
    if (status) *status = *function ? 0 : 1; /* 1: no such symbol */
    return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
