/* What the programs on sched_process_exec and sched_process_exit share: when a process (a thread group) has ended, and how.
 *
 * `struct task_struct *` is the tracepoint's argument: its pointers are followed directly.
 */
#ifndef CNI_TASK_H
#define CNI_TASK_H

#include "common.h"

#define GROUP_EXIT 4U /* SIGNAL_GROUP_EXIT, include/linux/sched/signal.h */

/* sched_process_exit fires once per thread, and `live` is lowered before (kernel/exit.c, do_exit). Two threads that end at
 * the same time may both find 0: whoever then takes the process' entry out of its map is the one. */
INLINE int group_is_dead(struct task_struct *task) {
    return task->signal->live.counter == 0;
}

/* What wait(2) will tell of the process (kernel/exit.c, wait_task_zombie): exit status << 8, or the signal's number. */
INLINE u32 group_status(struct task_struct *task) {
    if (task->signal->flags & GROUP_EXIT)
        return task->signal->group_exit_code;
    return task->group_leader->exit_code;
}

/* Tells a process from an earlier one of the same PID. */
INLINE u64 group_start(struct task_struct *task) {
    return task->group_leader->start_time;
}

#endif
