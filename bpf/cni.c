/* Runs of CNI plugins: how many, how long, how they ended, exactly; an event for each.
 *
 * Hooks, tracepoints with typed arguments (5.5): sched_process_exec (task, old pid, bprm), sched_process_exit (task).
 * Cost: each exec of the host reads the first 16 characters of its path; each end of a thread asks a hash while a plugin
 * is under way. The rest is paid by plugins alone. See README.md.
 * A plugin is a program that is started by a path straight below one of the plugin directories. The path is the one given
 * to execve(2): for a script its own, not the interpreter's; inside a container or a chroot the one that is seen there; a
 * relative path, and execveat(2) on a descriptor alone, are not recognised. A plugin that calls another (bridge calls
 * host-local) is a run, and so is the other. One that replaces itself by another (exec without fork) ends there, well;
 * one that replaces itself by what is no plugin goes on. A run is over when its last thread exits: its parent hears of it
 * once memory and files are given back, half a millisecond later.
 */
#include "task.h"

#define CNI_PATH 124     /* bytes of a path that are looked at: directories are shorter */
#define CNI_PIECE 256    /* bytes of the environment that are read at once */
#define CNI_PIECES 128   /* at most: variables, or parts of long ones */
#define CNI_WINDOW 16384 /* bytes at the environment's end that are searched: libcni appends what it says */

enum cni_command { CNI_OTHER, CNI_ADD, CNI_DEL, CNI_CHECK, CNI_VERSION, CNI_STATUS, CNI_GC };
enum cni_kind { CNI_ENDED = 1, CNI_REPLACED };

/* Eight characters as a number of this (little-endian) machine. */
#define CNI_TEXT(a, b, c, d, e, f, g, h)                                                                               \
    ((u64)(a) | (u64)(b) << 8 | (u64)(c) << 16 | (u64)(d) << 24 | (u64)(e) << 32 | (u64)(f) << 40 | (u64)(g) << 48 |    \
     (u64)(h) << 56)

struct cni_path {
    u32 length; /* bits */
    char text[CNI_PATH];
};

struct cni_directory {
    u32 length; /* with its last slash */
    u32 pad;
};

struct cni_plugin {
    u64 text[4]; /* 31 characters */
};

struct cni_key {
    struct cni_plugin plugin;
    u32 command;
    u32 pad;
};

/* Runs per bucket of their duration (not cumulative, the last is +Inf's), the sum of all in ns, those that failed. */
struct cni_counts {
    u64 counts[CNI_BUCKETS + 1];
    u64 sum;
    u64 failures;
};

struct cni_run {
    u64 begun;
    u64 start;
    struct netns_id netns;
    struct cni_plugin plugin;
    u64 interface[2];
    u64 container[9]; /* 64 characters as the runtimes have it */
    u32 command;
    u32 pad;
};

enum cni_said { CNI_SAID_COMMAND = 1, CNI_SAID_INTERFACE, CNI_SAID_CONTAINER };
#define CNI_SAID_AT(which) (0x100b0c00 >> (which) * 8 & 0xff) /* characters up to the value */

struct cni_scratch {
    struct cni_path path;
    u64 piece[CNI_PIECE / 8];
    u64 said[4][9]; /* what libcni says, in the order of enum cni_said */
    struct cni_run run;
};

SHAPE(cni_directories, struct cni_path, struct cni_directory);
SHAPE(cni_plugins, struct cni_plugin, u64);
SHAPE(cni_runs, struct cni_key, struct cni_counts);
SHAPE(cni_running, u32, struct cni_run);
SHAPE(cni_under_way, u32, u64);
SHAPE(cni_scratch, u32, struct cni_scratch);

struct cni_event {
    struct event head;
    u64 duration; /* ns */
    u32 status;   /* as wait(2) has it */
    u32 command;
    struct cni_plugin plugin;
    u64 interface[2];
    u64 container[9];
};

/* ---- at the end of a run ---- */

INLINE void cni_count(const struct cni_run *run, u64 duration, u32 status) {
    static const u64 bounds[CNI_BUCKETS] = {CNI_BOUNDS};
    struct cni_key key = {.plugin = run->plugin, .command = run->command};
    struct cni_counts *counts;
    u64 one = 1;
    u32 slot = 0;
    if (!map_lookup(MAP(cni_plugins), &key.plugin) && map_update(MAP(cni_plugins), &key.plugin, &one, 0)) {
        key.plugin.text[0] = CNI_TEXT('~', 'o', 't', 'h', 'e', 'r', 0, 0);
        key.plugin.text[1] = key.plugin.text[2] = key.plugin.text[3] = 0;
    }
    counts = map_lookup(MAP(cni_runs), &key);
    if (!counts) {
        struct cni_counts empty = {};
        map_update(MAP(cni_runs), &key, &empty, 1 /* BPF_NOEXIST: another CPU may have been faster */);
        counts = map_lookup(MAP(cni_runs), &key);
        if (!counts) {
            insert_failed(MAP_ID_cni_runs);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < CNI_BUCKETS; i++)
        slot += (bounds[i] - duration) >> 63; /* 1 where it is longer, without a branch */
    if (slot <= CNI_BUCKETS)
        RAISE(counts->counts[slot], 1);
    RAISE(counts->sum, duration);
    if (status)
        RAISE(counts->failures, 1);
}

/* `run` is a copy of an entry that this program alone has taken out of cni_running. */
INLINE void cni_ended(const struct cni_run *run, u32 tgid, u32 status, u32 kind) {
    u64 duration = bpf_ktime_get_ns() - run->begun;
    struct subject about = {.class = CNI_RUN, .who = WHO_IS_KNOWN, .kind = kind, .pid = tgid};
    struct cni_event *event;
    about.netns = run->netns;
    about.comm.words[0] = run->plugin.text[0];
    about.comm.words[1] = run->plugin.text[1] << 8 >> 8;
    cni_count(run, duration, status);
    event = event_reserve_critical(&about, sizeof(*event));
    if (!event)
        return;
    event->duration = duration;
    event->status = status;
    event->command = run->command;
    event->plugin = run->plugin;
    __builtin_memcpy(event->interface, run->interface, sizeof(event->interface));
    __builtin_memcpy(event->container, run->container, sizeof(event->container));
    event_submit_critical(event);
}

/* The number of entries of cni_running, or more. Most of the time it is 0: it spares the ends of all other threads a look
 * into a hash, whose memory is in no cache then. */
INLINE u64 *cni_under_way(void) {
    u32 zero = 0;
    return map_lookup(MAP(cni_under_way), &zero);
}

/* Takes the entry of a process out of the map, into `copy`. 0 where there was none, or it was an earlier process'. */
INLINE int cni_taken(u32 tgid, u64 start, struct cni_run *copy) {
    struct cni_run *run = map_lookup(MAP(cni_running), &tgid);
    u64 *under_way = cni_under_way();
    if (!run || !under_way)
        return 0;
    *copy = *run;
    if (map_delete(MAP(cni_running), &tgid))
        return 0;
    RAISE(*under_way, -1);
    return copy->start == start;
}

int cni_exit(unsigned long long *ctx) {
    struct task_struct *task = ARGUMENT(task_struct, ctx[0]);
    u32 tgid = task->tgid, slot = 1;
    struct cni_scratch *scratch;
    u64 *under_way = cni_under_way();
    if (!under_way || !*under_way || !map_lookup(MAP(cni_running), &tgid) || !group_is_dead(task))
        return 0;
    scratch = map_lookup(MAP(cni_scratch), &slot);
    if (scratch && cni_taken(tgid, group_start(task), &scratch->run))
        cni_ended(&scratch->run, tgid, group_status(task), CNI_ENDED);
    return 0;
}

/* ---- at its beginning ---- */

/* Whether one of the eight characters is a slash. */
INLINE u64 cni_slash(u64 text) {
    text ^= 0x2f2f2f2f2f2f2f2fULL;
    return (text - 0x0101010101010101ULL) & ~text & 0x8080808080808080ULL;
}

/* Whether a path begins as one of the directories does, as far as 16 characters tell: 0 for nearly all that is no plugin. */
INLINE int cni_begins(const char *path) {
    static const u64 heads[][4] = {CNI_HEADS};
    u64 text[2] = {};
    bpf_probe_read_kernel(text, sizeof(text), path);
#pragma unroll
    for (int i = 0; i < sizeof(heads) / sizeof(heads[0]); i++)
        if (!(((text[0] ^ heads[i][0]) & heads[i][1]) | ((text[1] ^ heads[i][2]) & heads[i][3])))
            return 1;
    return 0;
}

/* Fills the plugin's name in. 0: it is none. What an earlier, longer path left in `text` cannot match: directories have
 * no NUL. */
INLINE int cni_recognised(const char *path, struct cni_scratch *scratch) {
    struct cni_directory *directory;
    u64 *name = scratch->run.plugin.text;
    scratch->path.length = 8 * CNI_PATH;
    if (bpf_probe_read_kernel_str(scratch->path.text, CNI_PATH, path) < 0)
        return 0;
    directory = map_lookup(MAP(cni_directories), &scratch->path);
    if (!directory)
        return 0;
    __builtin_memset(&scratch->run, 0, sizeof(scratch->run));
    __builtin_memset(&scratch->said, 0, sizeof(scratch->said));
    bpf_probe_read_kernel_str(name, sizeof(scratch->run.plugin), path + directory->length);
    return !(cni_slash(name[0]) | cni_slash(name[1]) | cni_slash(name[2]) | cni_slash(name[3]));
}

/* 1 where it is not 0, by arithmetic: no branch, which the verifier would follow. */
INLINE u64 cni_differs(u64 x) {
    u64 negative = 0 - x;
    asm volatile("" : "+r"(negative)); /* or the compiler makes it a branch */
    x = (x | negative) >> 63;
    asm volatile("" : "+r"(x));
    return x;
}

/* Which of what libcni says the variable is whose start is in `piece`: its place in `said`; 0: none. */
INLINE u64 cni_variable(const u64 *piece) {
    u64 first = piece[0], second = piece[1];
    u64 command = cni_differs((first ^ CNI_TEXT('C', 'N', 'I', '_', 'C', 'O', 'M', 'M')) |
                              (u32)(second ^ CNI_TEXT('A', 'N', 'D', '=', 0, 0, 0, 0)));
    u64 interface = cni_differs((first ^ CNI_TEXT('C', 'N', 'I', '_', 'I', 'F', 'N', 'A')) |
                                ((second ^ CNI_TEXT('M', 'E', '=', 0, 0, 0, 0, 0)) & 0xffffff));
    u64 container = cni_differs((first ^ CNI_TEXT('C', 'N', 'I', '_', 'C', 'O', 'N', 'T')) |
                                (second ^ CNI_TEXT('A', 'I', 'N', 'E', 'R', 'I', 'D', '=')));
    return (command ^ 1) * CNI_SAID_COMMAND + (interface ^ 1) * CNI_SAID_INTERFACE + (container ^ 1) * CNI_SAID_CONTAINER;
}

/* Walks over the variables by reading strings: a read of fixed size that crosses the end of the stack would fail whole. What is
 * found is written to memory that the verifier does not follow, so that the paths through the loop are one for it. */
INLINE void cni_environment(struct task_struct *task, struct cni_scratch *scratch) {
    u64 at = task->mm->env_start, end = task->mm->env_end;
    u64 middle = (CNI_WINDOW - (end - at)) >> 63; /* 1: in the midst of a variable, as after a piece of a longer one */
    at += (end - at - CNI_WINDOW) * middle;
#pragma clang loop unroll(disable)
    for (int i = 0; i < CNI_PIECES; i++) {
        u64 which;
        long size;
        if (at >= end)
            break;
        size = bpf_probe_read_user_str(scratch->piece, CNI_PIECE, (void *)at);
        if (size < 0)
            break;
        which = cni_variable(scratch->piece) * (middle ^ 1) & 3;
        if (which)
            bpf_probe_read_user_str(scratch->said[which], sizeof(scratch->said[which]), (void *)at + CNI_SAID_AT(which));
        middle = (u64)size / CNI_PIECE; /* by arithmetic, which is one path for the verifier */
        at += size - middle + ((u64)(size - 1) >> 63); /* an empty string: kernels do not agree whether its NUL counts */
    }
}

INLINE u32 cni_command_number(const u64 *text) {
    if (text[0] == CNI_TEXT('A', 'D', 'D', 0, 0, 0, 0, 0))
        return CNI_ADD;
    if (text[0] == CNI_TEXT('D', 'E', 'L', 0, 0, 0, 0, 0))
        return CNI_DEL;
    if (text[0] == CNI_TEXT('C', 'H', 'E', 'C', 'K', 0, 0, 0))
        return CNI_CHECK;
    if (text[0] == CNI_TEXT('V', 'E', 'R', 'S', 'I', 'O', 'N', 0))
        return CNI_VERSION;
    if (text[0] == CNI_TEXT('S', 'T', 'A', 'T', 'U', 'S', 0, 0))
        return CNI_STATUS;
    if (text[0] == CNI_TEXT('G', 'C', 0, 0, 0, 0, 0, 0))
        return CNI_GC;
    return CNI_OTHER;
}

int cni_exec(unsigned long long *ctx) {
    struct task_struct *task = ARGUMENT(task_struct, ctx[0]);
    u32 tgid = task->tgid, slot = 0;
    u64 start, *under_way;
    struct linux_binprm *bprm = ARGUMENT(linux_binprm, ctx[2]);
    struct cni_scratch *scratch, *other;
    if (!cni_begins(bprm->filename))
        return 0;
    scratch = map_lookup(MAP(cni_scratch), &slot);
    under_way = cni_under_way();
    if (!scratch || !under_way || !cni_recognised(bprm->filename, scratch))
        return 0;
    start = group_start(task);
    cni_environment(task, scratch);
    scratch->run.command = cni_command_number(scratch->said[CNI_SAID_COMMAND]);
    scratch->run.interface[0] = scratch->said[CNI_SAID_INTERFACE][0];
    scratch->run.interface[1] = scratch->said[CNI_SAID_INTERFACE][1] << 8 >> 8; /* 15 characters */
    __builtin_memcpy(scratch->run.container, scratch->said[CNI_SAID_CONTAINER], sizeof(scratch->run.container));
    scratch->run.begun = bpf_ktime_get_ns();
    scratch->run.start = start;
    netns_load(task->nsproxy->net_ns, &scratch->run.netns);
    slot = 2;
    other = map_lookup(MAP(cni_scratch), &slot);
    if (other && cni_taken(tgid, start, &other->run))
        cni_ended(&other->run, tgid, 0, CNI_REPLACED);
    RAISE(*under_way, 1); /* first: it must never be too small */
    if (map_update(MAP(cni_running), &tgid, &scratch->run, 0)) {
        RAISE(*under_way, -1);
        insert_failed(MAP_ID_cni_running);
    }
    return 0;
}
