/* What every program shares: maps by descriptor, reading kernel memory, namespace identity, exact counters, and the path
 * of an event: filters, ratio, reserve, account.
 *
 * The loader puts this file in front of all the others and compiles them as one. It gives, on the command line: MAP_FD_x
 * and MAP_ID_x for each map x of programs.py, HAVE_struct_member for each member that this kernel has.
 */
#ifndef CNI_COMMON_H
#define CNI_COMMON_H

#include <kernel_types.h> /* made by the loader */

/* The compiler runs as nobody; there bcc cannot tell that the kernel has these (5.5) and puts older ones in their place. */
#undef bpf_probe_read_kernel
#undef bpf_probe_read_kernel_str
#undef bpf_probe_read_user
#undef bpf_probe_read_user_str

#define INLINE static __attribute__((always_inline)) inline
#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_FD_##name))

/* The size of a map's key and value are said twice, in programs.py and by these structs: they must agree. */
#define SHAPE(name, key, value)                                                                                        \
    _Static_assert(sizeof(key) == MAP_KEY_##name, "key of map " #name);                                                \
    _Static_assert(sizeof(value) == MAP_VALUE_##name, "value of map " #name)

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;

/* Reads one object of kernel memory; zeroes it where the address is bad. Some 20 ns. Programs on fentry, fexit and tp_btf may
 * follow the pointers of their arguments directly (`skb->dev`): the kernel knows their types, and a bad address reads 0.
 * In all others bcc would rewrite such a dereference: use READ. */
#define READ(into, from) bpf_probe_read_kernel(&(into), sizeof(into), &(from))

/* Counters of a per-CPU map are raised atomically: a program in an interrupt may run between load and store of another. */
#define RAISE(counter, amount) __sync_fetch_and_add(&(counter), (amount))

/* ---- identity of a network namespace ---- */

/* The cookie is never used twice. Kernels before 5.12 have one as an atomic64_t, which they make when someone asks for it: an
 * identity must not change, so there it is 0 and the inode stands alone. */
#if defined(HAVE_net_net_cookie) && !defined(HAVE_net_net_cookie_counter)
#define HAVE_COOKIE
#endif
struct netns_id {
    u64 cookie;
    u32 inum;
    u32 pad;
};

/* What user space needs to find the namespace in /proc: the inode of /proc/PID/net/stat. */
struct netns_about {
    u64 first_seen;
    u32 proc_ino;
    u32 pad;
};

SHAPE(namespaces, struct netns_id, struct netns_about);
SHAPE(constants, u32, u64);

/* Slots of `constants`, which the self-proof writes down. */
#define NETNS_OPERATIONS 0 /* address of the table of operations of network namespaces */
#define EXPORTER_TGID 1    /* the loader's parent */

INLINE void netns_read(struct net *net, struct netns_id *id) {
    id->cookie = 0;
    id->inum = 0;
    id->pad = 0;
    READ(id->inum, net->ns.inum);
#ifdef HAVE_COOKIE
    READ(id->cookie, net->net_cookie);
#endif
}

/* The same where `net` comes from an argument of a tp_btf, fentry or fexit program by its types. */
INLINE void netns_load(struct net *net, struct netns_id *id) {
    id->cookie = 0;
    id->pad = 0;
    id->inum = net->ns.inum;
#ifdef HAVE_COOKIE
    id->cookie = net->net_cookie;
#endif
}

/* Likewise for a pointer that may be something else (skb->dev shares its place with other things while a packet is
 * queued): a network namespace is known by its table of operations, whose address the self-proof has written down. */
INLINE int netns_load_checked(struct net *net, struct netns_id *id) {
    u32 slot = 0;
    u64 operations;
    u64 *expected = map_lookup(MAP(constants), &slot);
    if (!net || !expected)
        return 0;
    operations = (u64)net->ns.ops;
    if (!operations || operations != *expected)
        return 0;
    netns_load(net, id);
    return 1;
}

/* Notes a namespace that is counted for the first time. */
INLINE void netns_note(struct net *net, const struct netns_id *id) {
    struct netns_about about = {};
    struct proc_dir_entry *entry = 0;
    struct netns_about *known = map_lookup(MAP(namespaces), id);
    if (!net || (known && known->proc_ino))
        return;
    about.first_seen = bpf_ktime_get_ns();
    READ(entry, net->proc_net_stat);
    if (entry)
        READ(about.proc_ino, entry->low_ino);
    map_update(MAP(namespaces), id, &about, 0);
}

INLINE struct net *netns_of_current(void) {
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct nsproxy *proxy = 0;
    struct net *net = 0;
    READ(proxy, task->nsproxy);
    if (proxy)
        READ(net, proxy->net_ns);
    return net;
}

/* ---- exact counters ---- */

SHAPE(insert_failures, u32, u64);

INLINE void insert_failed(u32 id) {
    u64 *failures = map_lookup(MAP(insert_failures), &id);
    if (failures)
        RAISE(*failures, 1);
}

/* Raises a u64 of a per-CPU hash. The answer is 1 where the key is new, 0 else. A full map is counted. */
INLINE int count_in(void *map, u32 id, const void *key, u64 amount) {
    u64 zero = 0;
    u64 *counter = map_lookup(map, key);
    if (counter) {
        RAISE(*counter, amount);
        return 0;
    }
    map_update(map, key, &zero, 1 /* BPF_NOEXIST: another CPU may have been faster */);
    counter = map_lookup(map, key);
    if (!counter) {
        insert_failed(id);
        return 0;
    }
    RAISE(*counter, amount);
    return 1;
}
#define COUNT(name, key, amount) count_in(MAP(name), MAP_ID_##name, key, amount)

/* ---- addresses ---- */

/* IPv4 addresses are written as IPv6 does it (::ffff:a.b.c.d), so that one prefix map serves both. Ports: host order. */
struct flow {
    u8 source[16];
    u8 destination[16];
    u16 source_port;
    u16 destination_port;
    u16 family;  /* AF_INET, AF_INET6, 0: not read */
    u8 protocol; /* IPPROTO_x */
    u8 pad;
};

INLINE void address4(u8 *into, u32 address) {
    ((u32 *)into)[0] = 0;
    ((u32 *)into)[1] = 0;
    ((u32 *)into)[2] = bpf_htonl(0xffff);
    ((u32 *)into)[3] = address;
}

/* ---- events ---- */

enum event_class { NETNS, VETH, CNI_RUN, PACKET_DROP, TCP_FAULT, EXEC, CONNECTION, CONNECTION_CLOSE, SYSCALL, CLASSES };
#define CRITICAL(class) ((class) <= CNI_RUN)

/* The head of each record; its body follows. 48 bytes. */
struct event {
    u64 time; /* CLOCK_MONOTONIC, ns */
    u64 cookie;
    u32 inum;
    u8 class;
    u8 kind; /* what happened, a number of the program's own */
    u16 size;
    u32 ratio; /* in 1/2^32, ALL: 1: the record stands for 1/ratio events */
    u32 pid;   /* tgid; 0 where nobody is behind it: a packet in an interrupt */
    char comm[16];
};
#define ALL 0xffffffffU

/* seen = filtered + sampled_out + lost + submitted, per class, always. */
struct account {
    u64 seen;
    u64 filtered;
    u64 sampled_out;
    u64 lost;
    u64 submitted;
};

/* A rule holds for the classes of its mask; ratio 0 filters, another ratio thins what the class' ratio leaves. */
struct rule {
    u32 classes;
    u32 ratio;
    u64 matches;
};

struct prefix {
    u32 length; /* bits, of 128 */
    u8 address[16];
};

struct comm {
    char text[16];
};

enum filter {
    FILTER_PID = 1,
    FILTER_COMM = 2,
    FILTER_PREFIX = 4,
    FILTER_PORT = 8,
    FILTER_SYSCALL = 16,
    FILTER_NETNS = 32,
    FILTER_CGROUP = 64
};
#define FILTER_FLOW (FILTER_PREFIX | FILTER_PORT)

SHAPE(account, u32, struct account);
SHAPE(ratios, u32, u32);
SHAPE(filters, u32, u32);
SHAPE(filter_pid, u32, struct rule);
SHAPE(filter_comm, struct comm, struct rule);
SHAPE(filter_prefix, struct prefix, struct rule);
SHAPE(filter_port, u32, struct rule);
SHAPE(filter_syscall, u32, struct rule);
SHAPE(filter_netns, u32, struct rule);
SHAPE(filter_cgroup, u64, struct rule);

/* Who is behind an event: the running process, one that is known from before, or nobody. Rules by PID and command hold
 * for the first two alone. */
enum who { WHO_RUNS, WHO_IS_KNOWN, WHO_IS_NOBODY };

/* What an event is about; all that a filter may ask for. */
struct subject {
    struct netns_id netns;
    u32 class;
    u32 kind;
    u32 syscall;
    u32 who;
    u32 pid; /* with WHO_IS_KNOWN */
    struct comm comm;
};

/* One map lookup: which filter maps are not empty. */
INLINE u32 filters_in_use(void) {
    u32 zero = 0;
    u32 *flags = map_lookup(MAP(filters), &zero);
    return flags ? *flags : 0;
}

/* Applies the rule of one map: the smaller ratio wins. */
INLINE u32 thinned(void *map, const void *key, u32 class, u32 ratio) {
    struct rule *rule = map_lookup(map, key);
    if (!rule || !(rule->classes & (1U << class)))
        return ratio;
    RAISE(rule->matches, 1);
    return rule->ratio < ratio ? rule->ratio : ratio;
}

INLINE u32 thinned_by_flow(const struct flow *flow, u32 filters, u32 class, u32 ratio) {
    if (filters & FILTER_PREFIX) {
        struct prefix prefix = {.length = 128};
        __builtin_memcpy(prefix.address, flow->source, 16);
        ratio = thinned(MAP(filter_prefix), &prefix, class, ratio);
        __builtin_memcpy(prefix.address, flow->destination, 16);
        ratio = thinned(MAP(filter_prefix), &prefix, class, ratio);
    }
    if (filters & FILTER_PORT) {
        u32 port = flow->source_port;
        ratio = thinned(MAP(filter_port), &port, class, ratio);
        port = flow->destination_port;
        ratio = thinned(MAP(filter_port), &port, class, ratio);
    }
    return ratio;
}

INLINE u32 thinned_by_rules(const struct subject *about, const struct flow *flow, u32 filters) {
    u32 class = about->class, ratio = ALL;
    if (filters & FILTER_PID && about->who != WHO_IS_NOBODY) {
        u32 pid = about->who == WHO_RUNS ? bpf_get_current_pid_tgid() >> 32 : about->pid;
        ratio = thinned(MAP(filter_pid), &pid, class, ratio);
    }
    if (filters & FILTER_COMM && about->who != WHO_IS_NOBODY) {
        struct comm comm = about->comm;
        if (about->who == WHO_RUNS)
            bpf_get_current_comm(&comm, sizeof(comm));
        ratio = thinned(MAP(filter_comm), &comm, class, ratio);
    }
    if (filters & FILTER_SYSCALL && class == SYSCALL)
        ratio = thinned(MAP(filter_syscall), &about->syscall, class, ratio);
    if (filters & FILTER_NETNS)
        ratio = thinned(MAP(filter_netns), &about->netns.inum, class, ratio);
    if (filters & FILTER_CGROUP) {
        u64 cgroup = bpf_get_current_cgroup_id();
        ratio = thinned(MAP(filter_cgroup), &cgroup, class, ratio);
    }
    if (filters & FILTER_FLOW && flow)
        ratio = thinned_by_flow(flow, filters, class, ratio);
    return ratio;
}

/* Whether the event may be sent, as the ring stands: the place for a brake by its fill (bpf_ringbuf_query). */
INLINE int ring_has_room(u32 class) {
    return 1;
}

/* Decides on an event and, where it is kept, gives room in the ring with the head filled in. `size` (head and body) must
 * be a constant. `filters` is what filters_in_use() said: where it has a bit of FILTER_FLOW, `flow` must be filled. The
 * caller fills the body and calls event_submit. 0: the event is not kept, and that is accounted for. */
INLINE struct event *event_reserve(const struct subject *about, const struct flow *flow, u32 filters, u64 size) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u32 *class_ratio = map_lookup(MAP(ratios), &class);
    u32 ratio, by_rules = ALL;
    struct event *event;
    if (!account || !class_ratio)
        return 0;
    RAISE(account->seen, 1);
    if (filters)
        by_rules = thinned_by_rules(about, flow, filters);
    if (!by_rules) {
        RAISE(account->filtered, 1);
        return 0;
    }
    ratio = *class_ratio;
    if (by_rules != ALL)
        ratio = ratio == ALL ? by_rules : (u32)((u64)ratio * by_rules >> 32);
    if (!ratio || (ratio != ALL && bpf_get_prandom_u32() >= ratio)) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    if (CRITICAL(class))
        event = bpf_ringbuf_reserve(MAP(lifecycle), size, 0);
    else
        event = ring_has_room(class) ? bpf_ringbuf_reserve(MAP(events), size, 0) : 0;
    if (!event) {
        RAISE(account->lost, 1);
        return 0;
    }
    RAISE(account->submitted, 1);
    event->time = bpf_ktime_get_ns();
    event->cookie = about->netns.cookie;
    event->inum = about->netns.inum;
    event->class = class;
    event->kind = about->kind;
    event->size = size;
    event->ratio = ratio;
    if (about->who == WHO_RUNS) {
        event->pid = bpf_get_current_pid_tgid() >> 32;
        bpf_get_current_comm(event->comm, sizeof(event->comm));
    } else {
        event->pid = about->pid;
        __builtin_memcpy(event->comm, about->comm.text, sizeof(event->comm));
    }
    return event;
}

INLINE void event_submit(void *event) {
    bpf_ringbuf_submit(event, 0);
}

#endif
