/* The path of an event: what is said of it, one coin for all that thins it, the brake, room in a ring, its head, the account.
 *
 * Here is what every event does; what most pass by is in events.c, compiled once and called.
 * Cost: see README.md. Nothing is written by several CPUs, but for the rings: what is counted is counted per CPU.
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
#define RING MAP_ENTRIES_events /* bytes, a power of two */

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

/* All ones where there is a rule of this kind, where there is one or events are counted by it, else 0: without a branch, after
 * which the verifier would follow everything twice. */
#define RULED(asked, bit) (0 - ((asked) / (bit) & 1))
#define ASKED(asked, bit) (0 - (((asked) / (bit) | (asked) / ((bit) << 16)) & 1))
_Static_assert(COUNT_COMM == FILTER_COMM << 16 && COUNT_PREFIX == FILTER_PREFIX << 16, "ASKED is about these");

/* Fills in what is asked about an event; the address is the one that is counted by. The answer is of what kinds that is. */
INLINE u64 like_fill(u64 *like, const struct subject *about, struct sort sort) {
    const u64 *peer = sort.arrived ? about->flow.source : about->flow.destination;
    u64 asked = asked_of(about->filters, sort), commanded, addressed;
    struct comm comm = about->comm;
    if (sort.who == WHO_RUNS)
        comm_of_current(&comm);
    commanded = ASKED(asked, FILTER_COMM);
    addressed = ASKED(asked, FILTER_PREFIX);
    like[LIKE_COOKIE] = about->netns.cookie;
    like[LIKE_WHAT] = about->netns.inum | sort.class << 32 | (asked & (LONG | COUNTS) | addressed & FILTER_PREFIX) << 40;
    like[LIKE_COMM] = comm.words[0] & commanded;
    like[LIKE_COMM + 1] = comm.words[1] & commanded;
    like[LIKE_KEY] = peer[0] & addressed | like[LIKE_COMM] & ~addressed;
    like[LIKE_KEY + 1] = peer[1] & addressed | like[LIKE_COMM + 1] & ~addressed;
    return asked;
}

/* What an event does that is like one before: what is in one cache line says it all, in two where both an address and a command
 * are asked. 0: it is not, or more is to be done for it. `asked` is what like_fill answered. */
INLINE int event_expected(struct subject *about, const u64 *like, u64 asked) {
    u64 generation = about->filters >> 32, differs;
    struct place *place;
    u32 slot = about->slot, ratio;
    if (SELDOM(asked & LONG))
        return 0;
#pragma clang loop unroll(disable)
    for (u32 way = slot ? WAY_COUNTER : WAY_EVEN; way < WAY_SPARE; way++) {
        if (SELDOM(way != WAY_COUNTER))
            slot = place_of(places_of(like, 0), way);
        place = map_lookup(MAP(places), &slot);
        if (SELDOM(!place || place->busy))
            break;
        place->busy = 1;
        BARRIER();
        differs = unlike(place, like) | (place->generation ^ generation) | place->special;
        if (ASKED(asked, FILTER_COMM) & ASKED(asked, FILTER_PREFIX))
            differs |= uncommanded(place, like);
        if (!SELDOM(differs)) {
            place->pending++;
            ratio = place->ratio;
            BARRIER();
            place->busy = 0;
            about->chance = smaller(about->chance, chance_of(ratio));
            return by_quota(about);
        }
        BARRIER();
        place->busy = 0;
    }
    return 0;
}

/* Lowers the chance by what rules say of the event, and by the quota; counts it for its keys. The answer is 0 where it is
 * filtered. Old kernels have no shorter way: the verifier of 6.1 takes no loop that is entered in its midst, as the compiler makes
 * this one in some programs. */
INLINE int event_judged(struct subject *about, struct sort sort) {
    u64 like[LIKE_WORDS], asked = like_fill(like, about, sort);
    long answer;
#ifdef HAVE_CAST
    if (event_expected(about, like, asked))
        return 1;
#endif
    about->like = like;
    answer = judge(about);
    return answer == UNDECIDED ? decide(about) : answer;
}

/* Decides on an event that is not critical. The answer is 0 where it is not kept, and that is accounted for. */
INLINE int event_passes(struct subject *about, struct account *account, struct sort sort) {
    u32 class = sort.class;
    u32 *ratio = map_lookup(MAP(ratios), &class);
    u64 *filters = map_lookup(MAP(filters), &class);
    if (SELDOM(!ratio || !filters))
        return 0;
    RAISE(account->seen, 1);
    about->chance = chance_of(*ratio);
    about->filters = *filters;
    if ((u32)about->filters && SELDOM(!event_judged(about, sort))) {
        RAISE(account->filtered, 1);
        return 0;
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
INLINE void event_told_briefly(const struct subject *about, struct account *account, struct sort sort) {
    const u64 *peer = sort.arrived ? about->flow.source : about->flow.destination;
    struct event *event = bpf_ringbuf_reserve(MAP(events), sizeof(*event), 0);
    event = event_placed(event, account, about, sizeof(*event));
    if (!event)
        return;
    if (sort.family) {
        event->comm.words[0] = peer[0];
        event->comm.words[1] = peer[1];
    }
    event_submit(event, about);
}

/* Gives an event that is not critical, and is kept, room in the ring, with the head filled in. `size` (head and body) must be a
 * constant. The caller fills the body and calls event_submit. 0: there is nothing left to do, for the event is not kept, which
 * is accounted for, or nobody listens. */
INLINE void *event_reserve(struct subject *about, struct sort sort, u64 size) {
    u32 class = sort.class;
    struct account *account = map_lookup(MAP(account), &class);
    about->class = sort.class;
    about->who = sort.who;
    if (!account || !event_passes(about, account, sort))
        return 0;
    if (!is_listened_to(class)) {
        event_told_briefly(about, account, sort);
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
