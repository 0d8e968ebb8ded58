//! What the upstreams said lately: for its lifetime, and beyond it while they say nothing (RFC 8767).

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RData;

use crate::wire;

/// Bytes of all answers and keys together; the oldest go first.
const CAPACITY: usize = 4 << 20;
/// Bytes that an entry takes besides its key (which is there twice) and its answer.
const OVERHEAD: usize = 128;
/// The longest lifetime that is honoured. The cluster's DNS tells of changes no later.
const LONGEST: Duration = Duration::from_secs(30);
/// For how long after its lifetime an answer may stand in for one that can't be had (RFC 8767, 5: one to three days is usual).
const STALE: Duration = Duration::from_secs(24 * 3600);
/// The TTL of such an answer (RFC 8767, 4), and how long the upstreams are then left alone.
const STALE_TTL: u32 = 30;
const RECHECK: Duration = Duration::from_secs(5);
/// A TTL with the highest bit is none (RFC 2181, 8).
const LARGEST_TTL: u32 = i32::MAX as u32;

/// A bounded cache of answers by query.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_key: HashMap<Vec<u8>, Entry>,
    /// Keys in the order in which they were put, with the serial of that put: one that was put again is there twice.
    order: VecDeque<(Vec<u8>, u64)>,
    serial: u64,
    size: usize,
}

#[derive(Debug)]
struct Entry {
    answer: Vec<u8>,
    serial: u64,
    put: Instant,
    lifetime: Duration,
    /// Until when it may be used past its lifetime without asking.
    unasked_until: Option<Instant>,
}

/// An answer from the cache.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) message: Vec<u8>,
    /// It stands in for one that can't be had.
    pub(crate) is_stale: bool,
}

/// A query by what its answer depends on: all of it but id and case.
pub(crate) fn key(query: &[u8]) -> Option<Vec<u8>> {
    let mut key = query.to_vec();
    key.get_mut(wire::question_name(query)?)?.make_ascii_lowercase();
    Some(key.split_off(2))
}

impl Cache {
    /// The answer to `key`, if it holds still, or if nobody should be asked for a better one yet.
    pub(crate) fn get(&self, key: &[u8], now: Instant) -> Option<Kept> {
        let entries = self.lock();
        let entry = entries.by_key.get(key)?;
        let age = now.saturating_duration_since(entry.put);
        let is_stale = age >= entry.lifetime;
        if is_stale && entry.unasked_until.is_none_or(|until| now >= until) {
            return None;
        }
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let message = entry.aged(|ttl| if is_stale { STALE_TTL } else { ttl.saturating_sub(age) })?;
        Some(Kept { message, is_stale })
    }

    /// The answer to `key` when no upstream has one.
    pub(crate) fn get_stale(&self, key: &[u8], now: Instant) -> Option<Vec<u8>> {
        let mut entries = self.lock();
        let entry = entries.by_key.get_mut(key)?;
        if now.saturating_duration_since(entry.put) > entry.lifetime + STALE {
            return None;
        }
        entry.unasked_until = Some(now + RECHECK);
        entry.aged(|_| STALE_TTL)
    }

    /// Keeps an answer, if it may be kept.
    pub(crate) fn put(&self, key: Vec<u8>, answer: &[u8], now: Instant) {
        let Some(lifetime) = lifetime(answer) else { return };
        let mut entries = self.lock();
        entries.serial += 1;
        let entry = Entry { answer: answer.to_vec(), serial: entries.serial, put: now, lifetime, unasked_until: None };
        entries.size += size(&key, &entry);
        let serial = entries.serial;
        entries.order.push_back((key.clone(), serial));
        if let Some(before) = entries.by_key.insert(key.clone(), entry) {
            entries.size -= size(&key, &before);
        }
        entries.shrink();
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // A panic in between could at worst leave a size that is too large.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn shrink(&mut self) {
        // The places in the order that no longer count are bounded by those that do.
        while self.size > CAPACITY || self.order.len() > 2 * self.by_key.len() + 16 {
            let Some((key, serial)) = self.order.pop_front() else { return };
            match self.by_key.get(&key) {
                Some(entry) if entry.serial == serial && self.size > CAPACITY => {
                    self.size -= size(&key, entry);
                    self.by_key.remove(&key);
                }
                Some(entry) if entry.serial == serial => self.order.push_back((key, serial)),
                _ => {}
            }
        }
    }
}

impl Entry {
    fn aged(&self, ttl: impl Fn(u32) -> u32) -> Option<Vec<u8>> {
        let mut answer = self.answer.clone();
        wire::map_ttls(&mut answer, ttl)?;
        Some(answer)
    }
}

fn size(key: &[u8], entry: &Entry) -> usize {
    2 * key.len() + entry.answer.len() + OVERHEAD
}

/// For how long an answer holds; none if it may not be kept. A negative one holds as its SOA says (RFC 2308, 5), without one not
/// at all.
fn lifetime(answer: &[u8]) -> Option<Duration> {
    let message = Message::from_vec(answer).ok()?;
    let ttls = message.answers.iter().map(|record| record.ttl);
    let negative = message.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    let seconds = match message.metadata.response_code {
        _ if message.metadata.truncation => return None,
        ResponseCode::NoError if !message.answers.is_empty() => ttls.min()?,
        ResponseCode::NoError | ResponseCode::NXDomain => ttls.chain([negative?]).min()?,
        _ => return None,
    };
    (1..=LARGEST_TTL).contains(&seconds).then(|| Duration::from_secs(seconds.into()).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::{MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, Record, RecordType};

    use super::*;

    fn query(name: &str) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message
    }

    fn answer(name: &str, ttl: u32) -> Vec<u8> {
        let mut message = query(name).into_response();
        let address = RData::A(A(Ipv4Addr::LOCALHOST));
        message.answers = vec![Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, address)];
        message.to_vec().unwrap()
    }

    fn key_of(name: &str) -> Vec<u8> {
        key(&query(name).to_vec().unwrap()).unwrap()
    }

    fn ttl(answer: Option<Vec<u8>>) -> Option<u32> {
        answer.map(|answer| Message::from_vec(&answer).unwrap().answers[0].ttl)
    }

    fn kept(cache: &Cache, key: &[u8], now: Instant) -> Option<(u32, bool)> {
        cache.get(key, now).map(|kept| (ttl(Some(kept.message)).unwrap(), kept.is_stale))
    }

    #[test]
    fn an_answer_is_kept_for_its_lifetime_whatever_the_case() {
        let (cache, start) = (Cache::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        cache.put(key_of("db.example."), &answer("db.example.", 20), start);
        assert_eq!(kept(&cache, &key_of("DB.example."), after(5)), Some((15, false)));
        assert_eq!(kept(&cache, &key_of("db.example."), after(20)), None);
        assert_eq!(kept(&cache, &key_of("other.example."), start), None);
        cache.put(key_of("long.example."), &answer("long.example.", 3600), start);
        assert_eq!(kept(&cache, &key_of("long.example."), after(31)), None, "changes are heard of");
    }

    #[test]
    fn an_old_answer_stands_in_and_is_not_asked_for_at_once_again() {
        let (cache, start) = (Cache::default(), Instant::now());
        let (name, after) = (key_of("db.example."), |seconds| start + Duration::from_secs(seconds));
        cache.put(name.clone(), &answer("db.example.", 10), start);
        assert_eq!(ttl(cache.get_stale(&name, after(100))), Some(30));
        assert_eq!(kept(&cache, &name, after(104)), Some((30, true)));
        assert_eq!(kept(&cache, &name, after(105)), None);
        assert_eq!(ttl(cache.get_stale(&name, after(24 * 3600 + 11))), None);
    }

    #[test]
    fn failures_are_not_kept_and_negative_answers_as_their_soa_says() {
        let negative = |code, ttl, minimum| {
            let mut message = query("no.example.").into_response();
            message.metadata.response_code = code;
            let name = Name::from_ascii("example.").unwrap();
            let soa = SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, minimum);
            message.authorities = vec![Record::from_rdata(name, ttl, RData::SOA(soa))];
            lifetime(&message.to_vec().unwrap()).map(|lifetime| lifetime.as_secs())
        };
        assert_eq!(negative(ResponseCode::NXDomain, 20, 5), Some(5));
        assert_eq!(negative(ResponseCode::NoError, 4, 50), Some(4));
        assert_eq!(negative(ResponseCode::ServFail, 4, 50), None);
        assert_eq!(lifetime(&query("no.example.").into_response().to_vec().unwrap()), None, "no SOA");
        assert_eq!(lifetime(&answer("db.example.", 0)), None);
        assert_eq!(lifetime(&answer("db.example.", u32::MAX)), None);
        let mut cut = answer("db.example.", 9);
        cut[2] |= 2;
        assert_eq!(lifetime(&cut), None, "truncated");
    }

    #[test]
    fn it_has_a_bound() {
        let (cache, start) = (Cache::default(), Instant::now());
        for number in 0..60_000 {
            let name = format!("n{}.example.", number % 40_000);
            cache.put(key_of(&name), &answer(&name, 9), start);
        }
        let entries = cache.lock();
        let real: usize = entries.by_key.iter().map(|(key, entry)| size(key, entry)).sum();
        assert!(entries.size == real && real <= CAPACITY && real > CAPACITY / 2, "{real}");
        assert!(entries.order.len() <= 2 * entries.by_key.len() + 16);
        drop(entries);
        assert!(cache.get(&key_of("n19999.example."), start).is_some(), "the newest is there");
        for _ in 0..100_000 {
            cache.put(key_of("same.example."), &answer("same.example.", 9), start);
        }
        let entries = cache.lock();
        assert!(entries.order.len() <= 2 * entries.by_key.len() + 16);
    }
}
