/* The path of an event: what is said of it, one coin for all that thins it, the brake, room in a ring, its head, the account.
 *
 * Here is what every event does; what most pass by is in events.c, compiled once and called.
 * Cost: see README.md. Nothing is written by several CPUs, but for the rings: what is counted is counted per CPU.
 */
#ifndef CNI_EVENTS_H
#define CNI_EVENTS_H

#include "common.h"

enum event_class { NETNS, VETH, CNI_RUN, PACKET_DROP, TCP_FAULT, EXEC, CONNECTION, CONNECTION_CLOSE, SYSCALL, CLASSES };

/* Who is behind an event: the running process, one that is known from before, or nobody. Rules by PID and command hold
 * for the first two alone, by cgroup for the first. */
enum who { WHO_RUNS, WHO_IS_KNOWN, WHO_IS_NOBODY };

/* What an event is about; all that a filter may ask for. What programs give as a constant has words of its own: of these the
 * verifier knows, in the function that is called, what they are. */
struct subject {
    struct netns_id netns;
    u64 class;
    u64 who;
    u32 kind;
    u32 syscall;
    u32 pid;  /* with WHO_IS_KNOWN */
    u32 slot; /* of the map verdicts: this and what follows the flow is not for programs to fill in */
    struct comm comm;
    struct flow flow; /* of family 0 where there is none */
    u64 filters; /* the word of the map filters */
    u64 chance;
    u64 now;  /* ns; 0: nobody has asked */
    u64 wake; /* how the ring is to wake its reader */
};

/* The head of each record, 48 bytes; its body follows, where somebody listens to its class: else the head is all, and where
 * there is another side its address is in the place of the command. */
struct event {
    u64 time; /* CLOCK_MONOTONIC, ns; 0 in most records that are their heads alone */
    u64 cookie;
    u32 inum;
    u8 class;
    u8 kind; /* what happened, a number of the program's own */
    u16 size;
    u32 ratio; /* in 1/2^32, ALL: 1: the record stands for 1/ratio events */
    u32 pid;   /* tgid; 0 where nobody is behind it: a packet in an interrupt */
    struct comm comm;
};
#define ALL 0xffffffffU

/* seen = filtered + sampled_out + lost + submitted, per class, always. */
struct account {
    u64 seen;
    u64 filtered;
    u64 sampled_out;
    u64 lost;
    u64 submitted;
    u64 coin; /* where the generator of chance stands: xorshift64*, S. Vigna, ACM TOMS 42(4), 2016 */
    u64 used; /* bytes of the ring when it was looked at last */
    u64 kept;
};

SHAPE(account, u32, struct account);
SHAPE(ratios, u32, u32);
/* In the lower half which filter maps have a rule for the class and what is counted of it, in the upper half the generation: a
 * number that is another one after every change of a rule or a ratio. */
SHAPE(filters, u32, u64);

#define RING MAP_ENTRIES_events /* bytes, a power of two */

/* Chances are in 1/2^32, so that 1 has a number of its own. There are no branches in this arithmetic, and nothing in it that
 * the verifier knows: else it would follow each combination of what rules may have said, which are too many. */
#define WHOLE (1ULL << 32)
INLINE u64 chance_of(u32 ratio) {
    return (u64)ratio + (((u64)ratio + 1) >> 32);
}

/* Lowers the chance by what was said of events like this one, and by the quota. The answer is 0 where the event is filtered, and
 * UNDECIDED where there was none like it: then it is decided by rules. Two calls and not one in the other: the stack is small. */
#define UNDECIDED 2
static long (*judge)(struct subject *about) = (void *)CALL_events_judge;
static long (*decide)(struct subject *about) = (void *)CALL_rules_decide;
/* Looks how full the ring is, and at the clock; lowers the chance by it. */
static long (*brake)(struct subject *about) = (void *)CALL_events_brake;

/* Fills in the head of an event that is kept. */
INLINE void event_fill(struct event *event, const struct subject *about, u64 size) {
    event->time = about->now;
    event->cookie = about->netns.cookie;
    event->inum = about->netns.inum;
    event->class = about->class;
    event->kind = about->kind;
    event->size = size;
    event->ratio = about->chance == WHOLE ? ALL : about->chance;
    if (about->who == WHO_RUNS) {
        event->pid = tgid_of_current();
        comm_of_current(&event->comm);
    } else {
        event->pid = about->pid;
        event->comm = about->comm;
    }
}

/* What becomes of an event for which room was asked in a ring. */
INLINE void *event_placed(struct event *event, struct account *account, const struct subject *about, u64 size) {
    if (SELDOM(!event)) {
        RAISE(account->lost, 1);
        return 0;
    }
    RAISE(account->submitted, 1);
    event_fill(event, about, size);
    return event;
}

/* 32 random bits. Where a program in an interrupt comes between, both may get the same. */
INLINE u64 drawn_from(u64 *coin) {
    u64 x = *coin;
    if (SELDOM(!x))
        x = (u64)bpf_get_prandom_u32() << 32 | 1;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *coin = x;
    return x * 0x2545f4914f6cdd1dULL >> 32;
}

/* One coin for everything that thins: it decides on the chance so far, and again once the brake has lowered it. As long as the
 * ring is nearly empty one event in 16 looks at it, for whoever looks waits for another CPU's cache. */
INLINE int event_drawn(struct subject *about, struct account *account) {
    u64 drawn = drawn_from(&account->coin);
    about->now = about->wake = 0;
    if (drawn >= about->chance)
        return 0;
    if (account->kept++ % 16 && account->used < RING / 8)
        return 1;
    brake(about);
    return drawn < about->chance;
}

/* Decides on an event that is not critical. The answer is 0 where it is not kept, and that is accounted for. */
INLINE int event_passes(struct subject *about, struct account *account) {
    u32 class = about->class;
    u32 *ratio = map_lookup(MAP(ratios), &class);
    u64 *filters = map_lookup(MAP(filters), &class);
    if (SELDOM(!ratio || !filters))
        return 0;
    RAISE(account->seen, 1);
    about->chance = chance_of(*ratio);
    about->filters = *filters;
    if ((u32)about->filters) {
        long answer = judge(about);
        if (SELDOM(answer == UNDECIDED))
            answer = decide(about);
        if (SELDOM(!answer)) {
            RAISE(account->filtered, 1);
            return 0;
        }
    }
    if (!event_drawn(about, account)) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    return 1;
}

/* Sends an event of event_reserve. The reader is woken by the first that it has not read, and again as the ring is found fuller
 * by an eighth: so it may let them gather, and no event of a flood has to wake anybody. */
INLINE void event_submit(void *event, const struct subject *about) {
    bpf_ringbuf_submit(event, about->wake);
}

INLINE int is_listened_to(u32 class) {
    u32 slot = LISTENED;
    u64 *classes = map_lookup(MAP(constants), &slot);
    return classes && *classes >> class & 1;
}

/* The record that is its head alone. */
INLINE void event_told_briefly(const struct subject *about, struct account *account) {
    const u64 *peer = about->class == PACKET_DROP ? about->flow.source : about->flow.destination;
    struct event *event = bpf_ringbuf_reserve(MAP(events), sizeof(*event), 0);
    event = event_placed(event, account, about, sizeof(*event));
    if (!event)
        return;
    if (about->flow.family) {
        event->comm.words[0] = peer[0];
        event->comm.words[1] = peer[1];
    }
    event_submit(event, about);
}

/* Gives an event that is not critical, and is kept, room in the ring, with the head filled in. `size` (head and body) must be a
 * constant. The caller fills the body and calls event_submit. 0: there is nothing left to do, for the event is not kept, which
 * is accounted for, or nobody listens. */
INLINE void *event_reserve(struct subject *about, u64 size) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    if (!account || !event_passes(about, account))
        return 0;
    if (!is_listened_to(class)) {
        event_told_briefly(about, account);
        return 0;
    }
    about->now = bpf_ktime_get_ns();
    return event_placed(bpf_ringbuf_reserve(MAP(events), size, 0), account, about, size);
}

/* The same for a critical one: it has a ring of its own, and no rule, key or brake thins it. Only its class can be switched
 * off as a whole. */
INLINE void *event_reserve_critical(struct subject *about, u64 size) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u32 *class_ratio = map_lookup(MAP(ratios), &class);
    if (!account || !class_ratio)
        return 0;
    RAISE(account->seen, 1);
    if (!*class_ratio) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    about->chance = WHOLE;
    about->now = bpf_ktime_get_ns();
    return event_placed(bpf_ringbuf_reserve(MAP(lifecycle), size, 0), account, about, size);
}

/* Sends an event of event_reserve_critical. */
INLINE void event_submit_critical(void *event) {
    bpf_ringbuf_submit(event, 0);
}

#endif
