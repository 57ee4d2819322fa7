/* Network namespaces: created, gone, how long they lived. Veth and netkit devices of the host: appeared, deleted, moved.
 *
 * Hooks, namespaces: copy_net_ns (its return) or, for kprobes, loopback_net_init (one of the last steps of a creation, once
 * for each); proc_net_ns_exit (one of the last steps of an end, once for each). Where functions take no program, the
 * tracepoints cap_capable (6.14), sched_process_exec and sched_process_exit: nobody leaves a namespace that he made without
 * passing one of them, for unshare, setns and mount ask for CAP_SYS_ADMIN; so whoever passes one in a namespace that is not
 * known is in a new one. Before 6.14 the tracepoint sys_exit, where unshare ends. Both with task_newtask for clone, and with
 * netns_walk and netns_sweep, which the exporter runs in each update: what is there, and what of it is gone.
 * Hooks, devices: dev_init_scheduler (register_netdevice calls it when nothing but a notifier can refuse any more),
 * netdev_unregister_kobject (once for each device that is deleted), netdev_change_owner (once for each that has changed its
 * namespace, 5.7). All three belong to the core: the module veth may be loaded at any time, and netkit counts as well.
 * Cost: nothing per packet. cap_capable runs for each mmap and each privileged act (one lookup); sys_exit runs at the end
 * of each system call, and all system calls take the kernel's slow way then.
 */
#include "common.h"

enum lifecycle_count { NETNS_CREATED, NETNS_DESTROYED, VETH_CREATED, VETH_DELETED, VETH_MOVED };
enum lifecycle_kind { KIND_CREATED = 1, KIND_DESTROYED, KIND_DELETED, KIND_MOVED, KIND_ARRIVED };

#define NEW_NETNS 0x40000000 /* CLONE_NEWNET, include/uapi/linux/sched.h */
#define KERNEL_THREAD 0x00200000 /* PF_KTHREAD, include/linux/sched.h */
#define CAPABLE_OF_ALL 21 /* CAP_SYS_ADMIN, include/uapi/linux/capability.h */
#define WALK_STEPS 32

/* A namespace that lives. Before Linux 5.12 it gets its cookie late or never, so there it is entered with cookie 0. */
struct netns_alive {
    u64 address; /* of its struct net */
    u64 born;    /* CLOCK_MONOTONIC, ns; 0: it was there before us */
};

/* Counts per bucket (not cumulative, the last is +Inf's), then the sum of all in ns. */
struct netns_lifetimes {
    u64 counts[LIFETIME_BUCKETS + 1];
    u64 sum;
};

SHAPE(lifecycles, u32, u64);
SHAPE(netns_alive, struct netns_id, struct netns_alive);
SHAPE(netns_lifetime, u32, struct netns_lifetimes);
SHAPE(netns_cursor, u32, u64);

struct netns_event {
    struct event head;
    u64 lifetime; /* ns; 0: not known */
};

struct veth_event {
    struct event head; /* its namespace is where the device is; where it came from, if it moved */
    char name[16];
    char kind[16];
    struct netns_id other; /* where it went */
    u64 ifindex;
};

INLINE void lifecycle_count(u32 what) {
    u64 *counter = map_lookup(MAP(lifecycles), &what);
    if (counter)
        RAISE(*counter, 1);
}

/* ---- network namespaces ---- */

INLINE void netns_tell(const struct netns_id *id, u32 kind, u64 lifetime, u32 who) {
    struct subject about = {.netns = *id, .class = NETNS, .kind = kind, .who = who};
    struct netns_event *event;
    event = event_reserve_critical(&about, sizeof(*event));
    if (!event)
        return;
    event->lifetime = lifetime;
    event_submit_critical(event);
}

INLINE void netns_observe(u64 lifetime) {
    static const u64 bounds[LIFETIME_BUCKETS] = {LIFETIME_BOUNDS};
    u32 zero = 0, slot = 0;
    struct netns_lifetimes *times = map_lookup(MAP(netns_lifetime), &zero);
    if (!times)
        return;
#pragma unroll
    for (int i = 0; i < LIFETIME_BUCKETS; i++)
        slot += (bounds[i] - lifetime) >> 63; /* 1 where it is longer; without a branch, which old verifiers would follow */
    if (slot <= LIFETIME_BUCKETS)
        RAISE(times->counts[slot], 1);
    RAISE(times->sum, lifetime);
}

/* Counts an end; the answer is how long the namespace lived, 0 where its beginning was not seen. */
INLINE u64 netns_ended(const struct netns_alive *alive) {
    u64 lifetime = 0;
    if (alive && alive->born) {
        lifetime = bpf_ktime_get_ns() - alive->born;
        netns_observe(lifetime);
    }
    lifecycle_count(NETNS_DESTROYED);
    return lifetime;
}

/* How it is known that a namespace is new: a function that makes one said so, or nobody had seen it before. */
enum netns_evidence { MADE, MET };

/* Each namespace counts once: of several that meet it at the same time, one enters it. */
INLINE void netns_created(u64 address, u32 evidence, u32 who) {
    struct netns_alive alive = {.address = address, .born = bpf_ktime_get_ns()};
    struct netns_alive *last;
    struct netns_id id;
    long refusal;
    if (!address)
        return;
    netns_read((struct net *)address, &id);
    last = map_lookup(MAP(netns_alive), &id);
    if (last && (id.cookie || evidence == MET))
        return;
    if (last && !map_delete(MAP(netns_alive), &id))
        netns_tell(&id, KIND_DESTROYED, netns_ended(last), WHO_IS_NOBODY); /* without cookies: noticed only now */
    refusal = map_update(MAP(netns_alive), &id, &alive, 1 /* BPF_NOEXIST */);
    if (refusal == -17 /* EEXIST */)
        return;
    if (refusal)
        insert_failed(MAP_ID_netns_alive);
    if (refusal && evidence == MET)
        return; /* it would be met again, and count again */
    lifecycle_count(NETNS_CREATED);
    netns_tell(&id, KIND_CREATED, 0, who);
}

/* A creation that fails half-way is undone by whoever asked for it; a namespace that lived ends in a kernel thread. */
INLINE void netns_destroyed(struct net *net) {
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct netns_alive *alive;
    struct netns_id id, entered;
    u64 lifetime;
    u32 flags = 0;
    READ(flags, task->flags);
    netns_read(net, &id);
    entered = id;
    alive = map_lookup(MAP(netns_alive), &entered);
    if (!alive && id.cookie) {
        entered.cookie = 0;
        alive = map_lookup(MAP(netns_alive), &entered);
    }
    if (!alive && !(flags & KERNEL_THREAD))
        return;
    lifetime = netns_ended(alive);
    map_delete(MAP(netns_alive), &entered);
    netns_tell(&id, KIND_DESTROYED, lifetime, WHO_IS_NOBODY); /* always a kernel thread's work */
}

int netns_copied(unsigned long long *ctx) {
    struct net *net = (struct net *)ctx[3];
    if (ctx[0] & NEW_NETNS && net && (u64)net < -4095UL)
        netns_created((u64)net, MADE, WHO_RUNS);
    return 0;
}

int netns_exit_entered(unsigned long long *ctx) {
    netns_destroyed((struct net *)ctx[0]);
    return 0;
}

#if defined(HAVE_pt_regs_di) || defined(HAVE_pt_regs_regs)
int netns_loopback_probed(struct pt_regs *ctx) {
    netns_created(PT_REGS_PARM1(ctx), MADE, WHO_RUNS);
    return 0;
}

int netns_exit_probed(struct pt_regs *ctx) {
    netns_destroyed((struct net *)PT_REGS_PARM1(ctx));
    return 0;
}
#endif

/* Whether the namespaces that were there before us are entered, so that one that is not is new. */
INLINE int netns_all_known(void) {
    u32 one = 1;
    u64 *known = map_lookup(MAP(netns_cursor), &one);
    return known && *known;
}

/* The running process is in a namespace: is it a new one? */
INLINE void netns_met(void) {
    struct task_struct *task = ARGUMENT(task_struct, bpf_get_current_task_btf());
    struct net *net = task->nsproxy->net_ns;
    struct netns_id id;
    if (!net)
        return;
    netns_load(net, &id);
    if (!map_lookup(MAP(netns_alive), &id) && netns_all_known())
        netns_created((u64)net, MET, WHO_RUNS);
}

int netns_capable(unsigned long long *ctx) {
    if ((u32)ctx[3] == CAPABLE_OF_ALL)
        netns_met();
    return 0;
}

int netns_process(unsigned long long *ctx) {
    netns_met();
    return 0;
}

/* The new process has its namespace already when the tracepoint runs; clone and clone3 look the same here. */
int netns_newtask(unsigned long long *ctx) {
    struct task_struct *task = (struct task_struct *)ctx[0];
    if (ctx[1] & NEW_NETNS) {
        struct nsproxy *proxy = 0;
        struct net *net = 0;
        READ(proxy, task->nsproxy);
        READ(net, proxy->net_ns);
        netns_created((u64)net, MADE, WHO_RUNS);
    }
    return 0;
}

/* Number, result and first argument of a system call at its end. */
#if defined(HAVE_pt_regs_orig_ax)
#define UNSHARE 272
#define SYSCALL_NUMBER(regs) ((regs)->orig_ax)
#define FIRST_ARGUMENT(regs) ((regs)->di)
#elif defined(HAVE_pt_regs_orig_x0)
#define UNSHARE 97
#define SYSCALL_NUMBER(regs) ((regs)->syscallno)
#define FIRST_ARGUMENT(regs) ((regs)->orig_x0)
#endif

#ifdef UNSHARE
int netns_unshared(unsigned long long *ctx) {
    struct pt_regs *regs = (struct pt_regs *)ctx[0];
    if (SYSCALL_NUMBER(regs) != UNSHARE || ctx[1])
        return 0;
    if (FIRST_ARGUMENT(regs) & NEW_NETNS)
        netns_created((u64)netns_of_current(), MADE, WHO_RUNS);
    return 0;
}
#endif

/* References that keep the namespace alive; -1: this kernel keeps them elsewhere. */
INLINE int netns_references(struct net *net) {
    int count = -1;
#if defined(HAVE_net_ns___ns_ref)
    READ(count, net->ns.__ns_ref);
#elif defined(HAVE_net_ns_count)
    READ(count, net->ns.count);
#elif defined(HAVE_net_count)
    READ(count, net->count);
#endif
    return count;
}

/* Run by the exporter with a key of netns_alive: is it still that namespace, and does anything hold it? Its memory may be
 * another's by now; then inode and cookie are not what they were. */
int netns_sweep(struct bpf_raw_tracepoint_args *ctx) {
    struct netns_id id = {.cookie = ctx->args[0], .inum = ctx->args[1]}, there;
    struct netns_alive *found = map_lookup(MAP(netns_alive), &id);
    struct netns_alive was;
    struct net *net;
    if (!found)
        return 0;
    was = *found;
    net = (struct net *)was.address;
    netns_read(net, &there);
    if (id.inum == there.inum && (id.cookie == there.cookie || !id.cookie) && netns_references(net))
        return 1;
    if (!map_delete(MAP(netns_alive), &id))
        netns_tell(&id, KIND_DESTROYED, netns_ended(&was), WHO_IS_NOBODY);
    return 0;
}

/* Run by the exporter until the answer is 0, at its start and in each update: goes along the kernel's list of namespaces,
 * some at a time. At the start all of them were there before; later on, one that is not known is new. The list's head is no
 * namespace: it is known by what stands where the operations are. */
int netns_walk(struct bpf_raw_tracepoint_args *ctx) {
    u32 zero = 0, one = 1;
    u64 first = (u64)netns_of_current(), address, there, next, met = 0;
    u64 *cursor = map_lookup(MAP(netns_cursor), &zero);
    u64 *all_known = map_lookup(MAP(netns_cursor), &one);
    u64 *operations = map_lookup(MAP(constants), &zero);
    if (!cursor || !all_known || !operations || !first)
        return 0;
    address = *cursor ? *cursor : first;
#pragma clang loop unroll(disable)
    for (int i = 0; i < WALK_STEPS && !met; i++) {
        struct net *net = (struct net *)address;
        READ(there, net->ns.ops);
        if (there == *operations && netns_references(net)) {
            struct netns_alive alive = {.address = address};
            struct netns_id id;
            netns_read(net, &id);
            if (*all_known)
                met = map_lookup(MAP(netns_alive), &id) ? 0 : address;
            else
                map_update(MAP(netns_alive), &id, &alive, 1 /* BPF_NOEXIST: it may have been made in between */);
        }
        READ(next, net->list.next);
        address = next ? next - __builtin_offsetof(struct net, list) : first;
        if (address == first)
            break;
    }
    if (met)
        netns_created(met, MET, WHO_IS_NOBODY);
    *cursor = address == first ? 0 : address;
    if (address == first)
        *all_known = 1;
    return address != first;
}

/* ---- veth and netkit devices ---- */

INLINE int veth_kind(struct net_device *device, char *kind) {
    static const char names[2][8] = {"veth", "netkit"};
    const struct rtnl_link_ops *operations = 0;
    const char *name = 0;
    READ(operations, device->rtnl_link_ops);
    if (!operations)
        return 0;
    READ(name, operations->kind);
    bpf_probe_read_kernel_str(kind, 16, name);
    return *(u64 *)kind == *(u64 *)names[0] || *(u64 *)kind == *(u64 *)names[1];
}

/* Only what happens to the host's own devices is counted; of all others there are events. */
INLINE void veth_happened(struct net_device *device, struct net *from, struct net *into, u32 kind) {
    struct subject about = {.class = VETH};
    struct veth_event body = {};
    struct veth_event *event;
    u32 ifindex = 0;
    if (!veth_kind(device, body.kind))
        return;
    netns_read(from, &about.netns);
    if (into) {
        netns_read(into, &body.other);
        if (body.other.inum == HOST_NETNS) {
            lifecycle_count(VETH_CREATED);
            kind = KIND_ARRIVED;
        }
    }
    if (about.netns.inum == HOST_NETNS)
        lifecycle_count(into ? VETH_MOVED : kind == KIND_CREATED ? VETH_CREATED : VETH_DELETED);
    about.kind = kind;
    event = event_reserve_critical(&about, sizeof(*event));
    if (!event)
        return;
    READ(ifindex, device->ifindex);
    bpf_probe_read_kernel_str(event->name, sizeof(event->name), &device->name);
    __builtin_memcpy(event->kind, body.kind, sizeof(event->kind));
    event->other = body.other;
    event->ifindex = ifindex;
    event_submit_critical(event);
}

INLINE struct net *netns_of_device(struct net_device *device) {
    struct net *net = 0;
    READ(net, device->nd_net.net);
    return net;
}

int veth_registered(unsigned long long *ctx) {
    struct net_device *device = (struct net_device *)ctx[0];
    veth_happened(device, netns_of_device(device), 0, KIND_CREATED);
    return 0;
}

int veth_unregistered(unsigned long long *ctx) {
    struct net_device *device = (struct net_device *)ctx[0];
    veth_happened(device, netns_of_device(device), 0, KIND_DELETED);
    return 0;
}

int veth_changed(unsigned long long *ctx) {
    veth_happened((struct net_device *)ctx[0], (struct net *)ctx[1], (struct net *)ctx[2], KIND_MOVED);
    return 0;
}

#if defined(HAVE_pt_regs_di) || defined(HAVE_pt_regs_regs)
int veth_reg_probed(struct pt_regs *ctx) {
    struct net_device *device = (struct net_device *)PT_REGS_PARM1(ctx);
    veth_happened(device, netns_of_device(device), 0, KIND_CREATED);
    return 0;
}

int veth_unreg_probed(struct pt_regs *ctx) {
    struct net_device *device = (struct net_device *)PT_REGS_PARM1(ctx);
    veth_happened(device, netns_of_device(device), 0, KIND_DELETED);
    return 0;
}

int veth_change_probed(struct pt_regs *ctx) {
    struct net *from = (struct net *)PT_REGS_PARM2(ctx), *into = (struct net *)PT_REGS_PARM3(ctx);
    veth_happened((struct net_device *)PT_REGS_PARM1(ctx), from, into, KIND_MOVED);
    return 0;
}
#endif
