/* What every program shares: maps by descriptor, reading kernel memory, namespace identity, addresses; by places.h exact
 * counters, by events.h and rules.h the path of an event.
 *
 * The loader puts this file in front of all the others and compiles them as one. It gives, on the command line: MAP_FD_x,
 * MAP_ID_x and MAP_ENTRIES_x for each map x of programs.py, HAVE_struct_member for each member that this kernel has.
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

/* What comes seldom is put behind what comes always: where caches are cold, each line of instructions counts. */
#define SELDOM(condition) __builtin_expect(!!(condition), 0)

/* The size of a map's key and value are said twice, in programs.py and by these structs: they must agree. */
#define SHAPE(name, key, value)                                                                                        \
    _Static_assert(sizeof(key) == MAP_KEY_##name, "key of map " #name);                                                \
    _Static_assert(sizeof(value) == MAP_VALUE_##name, "value of map " #name)

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static u64 (*ring_query)(void *ring, u64 what) = (void *)BPF_FUNC_ringbuf_query; /* 5.8, as the ring itself */

/* Reads one object of kernel memory; zeroes it where the address is bad. Some 20 ns. Programs on fentry, fexit and tp_btf may
 * follow the pointers of their arguments directly (`skb->dev`): the kernel knows their types, and a bad address reads 0.
 * In all others bcc would rewrite such a dereference: use READ. */
#define READ(into, from) bpf_probe_read_kernel(&(into), sizeof(into), &(from))

/* Counters of a per-CPU map are raised atomically: a program in an interrupt may run between load and store of another. */
#define RAISE(counter, amount) __sync_fetch_and_add(&(counter), (amount))

/* 0, of which the verifier knows nothing: where it is added to what differs from path to path, the verifier follows what comes
 * after them once and not once for each. `argument` is one of a tracepoint's that is a number. */
#define NOTHING(argument) (*(volatile u64 *)&(argument) - *(volatile u64 *)&(argument))

/* What is written above is there before what is written below, for whoever interrupts. */
#define BARRIER() asm volatile("" ::: "memory")

/* Looks at kernel memory as an object of a type, by its BTF_ID_x, whose members a program on tp_btf, fentry or fexit may then
 * follow directly, at a tenth of what READ costs; a bad address reads 0. It is a function of the kernel (6.2). */
#ifdef BTF_ID_bpf_rdonly_cast
#define HAVE_CAST
static const void *(*cast)(const void *address, u32 id) = (void *)(KERNEL_FUNCTION + BTF_ID_bpf_rdonly_cast);

/* What a typed tracepoint gives, as a pointer of which the verifier knows the type and no more. To load a pointer through one
 * that it trusts it looks up by name, among all types of the kernel, which members inherit the trust: 0.2 ms each (6.2). */
#define ARGUMENT(type, argument) ((struct type *)cast((void *)(argument), BTF_ID_##type))
#else
#define ARGUMENT(type, argument) ((struct type *)(argument))
#endif

/* The running task, whose members are followed directly (5.11). */
#if defined(BTF_ID_bpf_get_current_task_btf) && defined(HAVE_task_struct_comm)
#define HAVE_CURRENT
static const struct task_struct *(*current_task)(void) = (void *)158; /* BPF_FUNC_get_current_task_btf */
#endif

struct comm {
    u64 words[2]; /* 16 characters */
};

INLINE void comm_of_current(struct comm *comm) {
#ifdef HAVE_CURRENT
    const u64 *text = (const u64 *)current_task()->comm;
    u64 first = text[0], second = text[1];
    asm volatile("" : "+r"(first), "+r"(second)); /* read here, by an instruction that reads nothing but tasks */
    comm->words[0] = first;
    comm->words[1] = second;
#else
    bpf_get_current_comm(comm, sizeof(*comm));
#endif
}

/* These two are followed, too: a helper's return, made safe against speculation, takes as long as all else that is asked. */
INLINE u32 tgid_of_current(void) {
#if defined(HAVE_CURRENT) && defined(HAVE_task_struct_tgid)
    u32 tgid = current_task()->tgid;
    asm volatile("" : "+r"(tgid));
    return tgid;
#else
    return bpf_get_current_pid_tgid() >> 32;
#endif
}

INLINE u64 cgroup_of_current(void) {
#if defined(HAVE_CURRENT) && defined(HAVE_css_set_dfl_cgrp) && defined(HAVE_kernfs_node_id)
    return ARGUMENT(task_struct, current_task())->cgroups->dfl_cgrp->kn->id;
#else
    return bpf_get_current_cgroup_id();
#endif
}

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
#define QUOTA 2            /* events of a namespace per second and CPU; what looks at it is COUNT_QUOTA (see Controls) */
#define LISTENED 3         /* classes of events that somebody listens to, a bit each */

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

INLINE void netns_load_current(struct netns_id *id) {
#ifdef HAVE_CURRENT
    netns_load(ARGUMENT(task_struct, current_task())->nsproxy->net_ns, id);
#else
    struct net *net = netns_of_current();
    if (net)
        netns_read(net, id);
#endif
}

/* ---- how full maps are ---- */

SHAPE(insert_failures, u32, u64);
SHAPE(inserts, u32, u64);

INLINE void insert_failed(u32 id) {
    u64 *failures = map_lookup(MAP(insert_failures), &id);
    if (failures)
        RAISE(*failures, 1);
}

/* Of a map that puts the least recently used out: what was put in, less what is there, was put out. */
INLINE void inserted(u32 id) {
    u64 *inserts = map_lookup(MAP(inserts), &id);
    if (inserts)
        RAISE(*inserts, 1);
}

/* ---- addresses ---- */

/* IPv4 addresses are written as IPv6 does it (::ffff:a.b.c.d), so that one prefix map serves both. Ports: host order. */
struct flow {
    u64 source[2]; /* 16 bytes, network order */
    u64 destination[2];
    u16 source_port;
    u16 destination_port;
    u16 family;  /* AF_INET, AF_INET6, 0: not read */
    u8 protocol; /* IPPROTO_x */
    u8 pad;
};

/* Two words of 32 bits, in the order in which they are in memory. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define WORDS(first, second) ((u64)(second) << 32 | (first))
#else
#define WORDS(first, second) ((u64)(first) << 32 | (second))
#endif

INLINE void address4(u64 *into, u32 address) {
    into[0] = 0;
    into[1] = WORDS(bpf_htonl(0xffff), address);
}

INLINE void address6(u64 *into, u32 a, u32 b, u32 c, u32 d) {
    into[0] = WORDS(a, b);
    into[1] = WORDS(c, d);
}

#include "places.h"
#include "events.h" /* the path of an event, which needs all of the above */

#endif
