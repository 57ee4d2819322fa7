/* System calls that the configuration names: an event for each.
 *
 * Hook: tracepoint sys_enter (registers, number) with typed arguments (5.5), attached only where calls are named.
 * Cost: each system call of the host asks an array, some 35 ns, and the hook itself has the kernel take its slower way
 * into system calls; a named call has the path of an event. Numbers are those of the machine's own ABI: a 32-bit process'
 * calls have others and are told under the wrong name. The exporter's own calls are left out: handling one would be the
 * next.
 */
#include "common.h"

SHAPE(syscalls, u32, u32);

struct syscall_event {
    struct event head;
    u64 number;
};

int syscall_enter(unsigned long long *ctx) {
    struct subject about = {};
    u32 number = ctx[1], zero = EXPORTER_TGID;
    u32 *named = map_lookup(MAP(syscalls), &number);
    u64 *exporter;
    struct syscall_event *event;
    if (!named || !*named)
        return 0;
    exporter = map_lookup(MAP(constants), &zero);
    if (exporter && tgid_of_current() == *exporter)
        return 0;
    netns_load_current(&about.netns);
    about.syscall = number;
    event = event_reserve(&about, (struct sort){SYSCALL, WHO_RUNS}, sizeof(*event));
    if (!event)
        return 0;
    event->number = number;
    event_submit(event, &about);
    return 0;
}
