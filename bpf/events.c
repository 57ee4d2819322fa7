/* What an event's path calls: the judgement by rules and keys, and the brake.
 *
 * As what is in rules.c it is compiled once, and the loader puts it behind each program.
 * Cost: see README.md. A flood is one event over and over. So what was found out about one, for which up to twelve
 * hashes are asked, is kept per CPU for the next that is like it in all that was asked.
 */
#include "common.h"

SHAPE(fullest, u32, u64);

/* ---- what was said of events like this one ---- */

/* All that is asked about an event: what rules of LONG kinds ask, too. */
struct asked {
    const struct subject *about;
    u64 longer[LONGER_WORDS];
};
/* Three steps of events_judge, by calls, which keep its stack small: to fill in what LONG kinds ask, with a hash of it as the
 * answer; whether what was said at the event's place is about something else (1), or the place is another's counter's (ANOTHERS); to
 * have it be about this. */
#define ANOTHERS 2
static long (*fill_longer)(struct asked *asked) = (void *)CALL_events_longer;
static long (*is_unlike)(const struct asked *asked) = (void *)CALL_events_unlike;
static long (*note)(const struct asked *asked) = (void *)CALL_events_note;

int events_longer(struct asked *asked) {
    const struct subject *about = asked->about;
    const struct flow *flow = &about->flow;
    const u64 *own = about->class == PACKET_DROP ? flow->destination : flow->source;
    u64 *words = asked->longer, kinds = REST_OF(about->like), hash = 0;
    if (!(kinds & LONG))
        return 0;
    words[LONGER_WHO] = ((u64)about->syscall & RULED(kinds, FILTER_SYSCALL) |
                         (flow->source_port | (u64)flow->destination_port << 16) & RULED(kinds, FILTER_PORT))
                        << 32;
    if (kinds & FILTER_PID)
        words[LONGER_WHO] |= about->who == WHO_RUNS ? tgid_of_current() : about->pid;
    words[LONGER_CGROUP] = kinds & FILTER_CGROUP ? cgroup_of_current() : 0;
    words[LONGER_OWN] = own[0] & RULED(kinds, FILTER_OWN);
    words[LONGER_OWN + 1] = own[1] & RULED(kinds, FILTER_OWN);
#pragma unroll
    for (u32 i = 0; i < LONGER_WORDS; i++)
        hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ULL;
    return hash >> 33;
}

int events_unlike(const struct asked *asked) {
    u32 slot = asked->about->slot;
    const u64 *like = asked->about->like;
    struct place *place = map_lookup(MAP(places), &slot);
    u64 differs;
    if (!place || (place->counter && (place->like[LIKE_COOKIE] ^ like[LIKE_COOKIE] | INUM_OF(place->like) ^ INUM_OF(like))))
        return ANOTHERS;
    differs = unlike(place, like) | uncommanded(place, like);
    if (REST_OF(like) & LONG) {
#pragma unroll
        for (u32 i = 0; i < LONGER_WORDS; i++)
            differs |= place->longer[i] ^ asked->longer[i];
    }
    return !!differs;
}

int events_note(const struct asked *asked) {
    u32 slot = asked->about->slot;
    const u64 *like = asked->about->like;
    struct place *place = map_lookup(MAP(places), &slot);
    if (!place)
        return 0;
    __builtin_memcpy(place->like, like, sizeof(place->like));
    __builtin_memcpy(place->comm, &like[LIKE_COMM], sizeof(place->comm));
    if (REST_OF(like) & LONG)
        __builtin_memcpy(place->longer, asked->longer, sizeof(place->longer));
    return 0;
}

/* Looks in its places for what is said of events like this one. Where none has it, the first is taken of which what it says holds no
 * longer, else the odd one: so kinds of events that come in turns do not put each other out. Now and then one of the others is
 * then to be decided anew, which frees it if none like it comes any more. A program in an interrupt may come between any two
 * steps of another: it takes the spare place where that one is at work in its own, and says that the event is filtered where
 * that is taken as well. */
int events_judge(struct subject *about) {
    struct place *place = 0, *passed = 0;
    u32 places, generation = about->filters >> 32;
    struct asked asked;
    long differs = 1;
    asked.about = about;
    places = places_of(about->like, NOTHING(about->filters) + fill_longer(&asked));
#pragma clang loop unroll(disable)
    for (u32 way = about->slot && !(REST_OF(about->like) & LONG) ? WAY_COUNTER : WAY_EVEN; way <= WAY_SPARE; way++) {
        u32 slot = way == WAY_COUNTER ? about->slot : place_of(places, way);
        about->slot = slot;
        place = map_lookup(MAP(places), &slot);
        if (!place || (place->busy && way == WAY_SPARE))
            return 0;
        if (place->busy) {
            way = WAY_SPARE - 1;
            continue;
        }
        place->busy = 1;
        BARRIER();
        differs = is_unlike(&asked);
        if (!differs && place->generation == generation)
            return judged(about, place);
        if (differs != ANOTHERS && (!differs || way >= WAY_ODD || place->generation != generation))
            break;
        BARRIER();
        place->busy = 0;
        if (differs != ANOTHERS && (!passed || bpf_get_prandom_u32() % 2))
            passed = place;
    }
    if (!place)
        return 0;
    if (differs ? place->pending : place->learned)
        settle(place);
    if (differs) {
        note(&asked);
        if (passed && !(bpf_get_prandom_u32() % 16))
            passed->generation = 0;
    }
    place->generation = generation;
    return UNDECIDED;
}

/* ---- the brake ---- */

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

int events_brake(struct subject *about) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u64 used = ring_query(MAP(events), 0 /* BPF_RB_AVAIL_DATA */);
    if (!account)
        return 0;
    about->wake = (account->used / (RING / 8) - used / (RING / 8)) >> 63 << 1; /* BPF_RB_FORCE_WAKEUP: fuller by an eighth */
    about->now = bpf_ktime_get_ns();
    about->chance = halved(about->chance, halvings_by_fill(class, used));
    account->used = used;
    return 0;
}
