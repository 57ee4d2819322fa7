/* The path of an event: rules and counts by key, one coin for all that thins it, the brake, room in a ring, its head, the account.
 *
 * Cost: see README.md. Nothing here is written by several CPUs, but for the rings: what is counted is counted per CPU.
 */
#ifndef CNI_EVENTS_H
#define CNI_EVENTS_H

#include "rules.h"

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
SHAPE(fullest, u32, u64);

/* ---- the brake ---- */

#define RING MAP_ENTRIES_events /* bytes, a power of two */

/* Halvings by the fill of the ring: from a quarter on one more for each eighth, in the last eighth for each 64th; warnings
 * begin one later, errors two. What is not sent so is sampled out, with its weight on what is sent: it takes a reader that
 * stands still for seconds to fill the ring with what nobody can read. */
INLINE u32 halvings_by_fill(u32 class, u64 used) {
    u32 zero = 0, steps, begin = class == PACKET_DROP ? 3 : class == TCP_FAULT ? 2 : 1;
    u64 *fullest;
    if (used < RING / 8)
        return 0;
    fullest = map_lookup(MAP(fullest), &zero);
    if (fullest && used > *fullest)
        *fullest = used;
    steps = used / (RING / 8);
    if (used >= RING / 8 * 7)
        steps += (used - RING / 8 * 7) / (RING / 64);
    return steps > begin ? steps - begin : 0;
}

/* Fills in the head of an event that is kept. */
INLINE void event_fill(struct event *event, const struct subject *about, u64 now, u64 chance, u64 size) {
    event->time = now;
    event->cookie = about->netns.cookie;
    event->inum = about->netns.inum;
    event->class = about->class;
    event->kind = about->kind;
    event->size = size;
    event->ratio = chance == WHOLE ? ALL : chance;
    if (about->who == WHO_RUNS) {
        event->pid = bpf_get_current_pid_tgid() >> 32;
        comm_of_current(&event->comm);
    } else {
        event->pid = about->pid;
        event->comm = about->comm;
    }
}

/* 32 random bits. Where a program in an interrupt comes between, both may get the same. */
INLINE u64 drawn_from(u64 *coin) {
    u64 x = *coin;
    if (!x)
        x = (u64)bpf_get_prandom_u32() << 32 | 1;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *coin = x;
    return x * 0x2545f4914f6cdd1dULL >> 32;
}

/* What is known of an event that is kept, as far as it goes. */
struct pass {
    struct account *account;
    u64 chance;
    u64 now;  /* ns; 0: nobody has asked */
    u64 wake; /* how the ring is to wake its reader */
};

/* How full the ring is. As long as it is nearly empty one event in 16 looks, for whoever looks waits for another CPU's cache;
 * the same one looks at the clock. */
INLINE u64 ring_used(struct pass *pass) {
    struct account *account = pass->account;
    u64 before = account->used, used;
    pass->wake = 0;
    if (account->kept++ % 16 && before < RING / 8)
        return before;
    account->used = used = ring_query(MAP(events), 0 /* BPF_RB_AVAIL_DATA */);
    pass->wake = (before / (RING / 8) - used / (RING / 8)) >> 63 << 1; /* BPF_RB_FORCE_WAKEUP where it is fuller by an eighth */
    pass->now = bpf_ktime_get_ns();
    return used;
}

/* One coin for everything that thins: it decides on the chance so far, and again once the brake has lowered it. The answer is
 * 0 where the event is out. */
INLINE int event_drawn(struct pass *pass, u32 class) {
    u64 drawn = drawn_from(&pass->account->coin);
    if (drawn >= pass->chance)
        return 0;
    pass->chance = halved(pass->chance, halvings_by_fill(class, ring_used(pass)));
    return drawn < pass->chance;
}

/* What becomes of an event for which room was asked in a ring. */
INLINE struct event *event_placed(struct event *event, struct account *account, const struct subject *about, u64 now,
                                  u64 chance, u64 size) {
    if (!event) {
        RAISE(account->lost, 1);
        return 0;
    }
    RAISE(account->submitted, 1);
    event_fill(event, about, now, chance, size);
    return event;
}

/* Decides on an event that is not critical. `filters` is what filters_in_use() said: where it has a bit of FILTER_FLOW, `flow`
 * must be filled. 0: the event is not kept, and that is accounted for; else it is for event_reserve. */
INLINE int event_passes(const struct subject *about, const struct flow *flow, u64 filters, struct pass *pass) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u32 *class_ratio = map_lookup(MAP(ratios), &class);
    u64 nothing;
    if (!account || !class_ratio)
        return 0;
    pass->account = account;
    RAISE(account->seen, 1);
    pass->chance = chance_of(*class_ratio);
    pass->now = nothing = account->lost >> 63; /* 0, but the verifier does not know */
    if (filters & (FILTERS | COUNTS << 16) && !judged(about, flow, filters, nothing, &pass->chance)) {
        RAISE(account->filtered, 1);
        return 0;
    }
    if (filters & COUNT_QUOTA && about->netns.inum) {
        struct quota quota = {.netns = about->netns, .class = class};
        pass->chance = halved(pass->chance, halvings_by_quota(&quota));
        pass->now = quota.now;
    }
    if (!event_drawn(pass, class)) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    return 1;
}

/* Sends an event of event_reserve. The reader is woken by the first that it has not read, and again as the ring is found fuller
 * by an eighth: so it may let them gather, and no event of a flood has to wake anybody. */
INLINE void event_submit(void *event, const struct pass *pass) {
    bpf_ringbuf_submit(event, pass->wake);
}

INLINE int is_listened_to(u32 class) {
    u32 slot = LISTENED;
    u64 *classes = map_lookup(MAP(constants), &slot);
    return classes && *classes >> class & 1;
}

/* Gives an event that passed room in the ring, with the head filled in. `size` (head and body) must be a constant, `peer` is the
 * other side's address, or 0. The caller fills the body and calls event_submit. 0: there is nothing left to do, for the event is
 * lost, or nobody listens. */
INLINE struct event *event_reserve(const struct subject *about, const struct pass *pass, const u64 *peer, u64 size) {
    struct event *event;
    if (is_listened_to(about->class)) {
        event = bpf_ringbuf_reserve(MAP(events), size, 0);
        return event_placed(event, pass->account, about, bpf_ktime_get_ns(), pass->chance, size);
    }
    event = bpf_ringbuf_reserve(MAP(events), sizeof(*event), 0);
    event = event_placed(event, pass->account, about, pass->now, pass->chance, sizeof(*event));
    if (!event)
        return 0;
    if (peer) {
        event->comm.words[0] = peer[0];
        event->comm.words[1] = peer[1];
    }
    event_submit(event, pass);
    return 0;
}

/* The same for a critical one: it has a ring of its own, and no rule, key or brake thins it. Only its class can be switched
 * off as a whole. */
INLINE struct event *event_reserve_critical(const struct subject *about, u64 size) {
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
    return event_placed(bpf_ringbuf_reserve(MAP(lifecycle), size, 0), account, about, bpf_ktime_get_ns(), WHOLE, size);
}

/* Sends an event of event_reserve_critical. */
INLINE void event_submit_critical(void *event) {
    bpf_ringbuf_submit(event, 0);
}

#endif
