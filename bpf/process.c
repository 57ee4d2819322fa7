/* Processes of containers: an event when one is started, and one at its end.
 *
 * Hooks, tracepoints with typed arguments (5.5): sched_process_exec (task, old pid, bprm), sched_process_exit (task).
 * Cost: per exec and per end of a process some ten pointers; the rest, lookups in a hash, for processes of containers alone.
 * In a container is what has a PID namespace of its own, or another network namespace than the host's first process. The
 * end is told of what was seen to start and is in a container still, if anybody wants the class at all: what only forks is
 * no event.
 */
#include "task.h"

enum process_kind { PROCESS_STARTED = 1, PROCESS_ENDED };

struct process_start {
    u64 begun;
    u64 start;
    struct netns_id netns;
};

SHAPE(process_started, u32, struct process_start);

struct process_event {
    struct event head;
    u64 duration; /* ns, at its end */
    u32 status;   /* as wait(2) has it, at its end */
    u32 parent;   /* tgid */
    u64 file[8];  /* 63 characters of the path that was given to execve(2), at its start */
};

/* Whether a process is in a container; fills its network namespace in. */
INLINE int process_contained(struct task_struct *task, struct netns_id *netns) {
    netns_load(task->nsproxy->net_ns, netns);
    return task->thread_pid->level || netns->inum != HOST_NETNS;
}

int process_exec(unsigned long long *ctx) {
    struct task_struct *task = ARGUMENT(task_struct, ctx[0]);
    struct linux_binprm *bprm = ARGUMENT(linux_binprm, ctx[2]);
    struct subject about = {.kind = PROCESS_STARTED};
    u32 tgid = task->tgid, class = EXEC;
    u32 *ratio = map_lookup(MAP(ratios), &class);
    struct process_event *event;
    if (!ratio || !process_contained(task, &about.netns))
        return 0;
    if (*ratio) {
        struct process_start since = {.begun = bpf_ktime_get_ns(), .start = group_start(task), .netns = about.netns};
        map_update(MAP(process_started), &tgid, &since, 0);
    }
    event = event_reserve(&about, (struct sort){EXEC, WHO_RUNS}, sizeof(*event));
    if (!event)
        return 0;
    event->duration = 0;
    event->status = 0;
    event->parent = task->real_parent->tgid;
    __builtin_memset(event->file, 0, sizeof(event->file));
    bpf_probe_read_kernel_str(event->file, sizeof(event->file), bprm->filename);
    event_submit(event, &about);
    return 0;
}

int process_exit(unsigned long long *ctx) {
    struct task_struct *task = ARGUMENT(task_struct, ctx[0]);
    struct subject about = {.kind = PROCESS_ENDED};
    u32 tgid = task->tgid;
    struct process_start *since;
    struct process_event *event;
    u64 duration, start;
    if (!group_is_dead(task) || !process_contained(task, &about.netns))
        return 0;
    since = map_lookup(MAP(process_started), &tgid);
    if (!since)
        return 0;
    duration = bpf_ktime_get_ns() - since->begun;
    start = since->start;
    about.netns = since->netns;
    if (map_delete(MAP(process_started), &tgid) || start != group_start(task))
        return 0;
    event = event_reserve(&about, (struct sort){EXEC, WHO_RUNS}, sizeof(*event));
    if (!event)
        return 0;
    event->duration = duration;
    event->status = group_status(task);
    event->parent = task->real_parent->tgid;
    __builtin_memset(event->file, 0, sizeof(event->file));
    event_submit(event, &about);
    return 0;
}
