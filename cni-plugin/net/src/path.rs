//! Which packets get through to another node: packetization-layer path MTU discovery (RFC 4821) by questions of a known size. Pure.

/// The smallest size that is asked for: every IPv4 node takes it (RFC 791), and on paths of IPv6 1280 bytes are the least (RFC 8200, section 5). Where not even this passes, large questions are kept from passing
/// for being questions.
const FLOOR: u16 = 576;
/// So many questions of a size in a row without an answer, while small ones are answered, and it doesn't pass.
const TRIES: u32 = 3;
/// How often a size must be found not to pass before it is told that the next smaller one is the largest.
const FINDINGS: u32 = 2;
/// Questions of one check at most: a search needs less than fifty if none is answered late or left out of account.
const QUESTIONS: u32 = 100;

/// What became of a question of some size.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It was answered.
    Passed,
    /// It was not, but a small one was that was asked after it.
    Lost,
    /// It can't be sent on, as this node's interface or a router said, which may also have told what can.
    TooBig(Option<u16>),
    /// No small one was answered either: that says nothing of sizes.
    Unknown,
}

/// The path to one node. It is checked again and again; each check asks one question after the other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Path {
    /// The largest packet that may have to pass, in bytes with the IP header.
    wanted: u16,
    too_small: Option<u16>,
    check: Option<Check>,
}

/// A check that is under way.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Check {
    /// The largest size that has passed, or the one below the floor.
    passes: u16,
    /// The smallest size that has not, or the one above what is wanted.
    fails: u16,
    /// How often the latter was found not to pass.
    findings: u32,
    /// Questions of the present size that were lost in a row.
    lost: u32,
    /// A size that may be the largest that passes: what was found before, or what a router says.
    hint: Option<u16>,
    /// Questions that may still be asked.
    left: u32,
}

impl Path {
    /// A path of which nothing is known but what was found before, if it was too small.
    pub fn new(wanted: u16, too_small: Option<u16>) -> Self {
        let wanted = wanted.max(FLOOR);
        Self { wanted, too_small: too_small.filter(|size| *size < wanted), check: None }
    }

    /// The largest packet that passes, in bytes with the IP header, if that is known to be less than what is wanted.
    pub fn too_small(&self) -> Option<u16> {
        self.too_small
    }

    /// Whether a check is under way.
    pub fn is_checked(&self) -> bool {
        self.check.is_some()
    }

    /// Lets the path be as wide as `wanted` from now on. Returns whether that is news: then it should be checked soon.
    pub fn want(&mut self, wanted: u16) -> bool {
        let is_news = wanted.max(FLOOR) != self.wanted;
        if is_news {
            *self = Self::new(wanted, self.too_small);
        }
        is_news
    }

    /// The size of the next question. Begins a check if none is under way.
    pub fn ask(&mut self) -> u16 {
        let (wanted, hint) = (self.wanted, self.too_small);
        let check = self.check.get_or_insert_with(|| Check::new(wanted, hint));
        check.left = check.left.saturating_sub(1);
        check.candidate(wanted)
    }

    /// Ends a check without a result.
    pub fn abandon(&mut self) {
        self.check = None;
    }

    /// Takes in what became of a question of `size` bytes, be it the last one or an earlier one.
    pub fn step(&mut self, size: u16, outcome: Outcome) {
        let Some(mut check) = self.check.take() else { return };
        let is_present = size == check.candidate(self.wanted);
        match outcome {
            Outcome::Passed => check.pass(size, self.wanted),
            Outcome::Lost if is_present && check.lost + 1 < TRIES => check.lost += 1,
            Outcome::Lost if is_present => check.fail(size),
            Outcome::TooBig(carries) if size > check.passes && size <= check.fails => {
                check.hint = carries.or(check.hint);
                check.fail(size);
            }
            Outcome::Unknown if is_present => check.lost = 0,
            Outcome::Lost | Outcome::TooBig(_) | Outcome::Unknown => {}
        }
        match check.result(self.wanted, self.too_small) {
            Some(too_small) => self.too_small = too_small,
            None => self.check = Some(check).filter(|check| check.left > 0),
        }
    }
}

impl Check {
    fn new(wanted: u16, hint: Option<u16>) -> Self {
        let fails = wanted.saturating_add(1);
        Self { passes: FLOOR - 1, fails, findings: 0, lost: 0, hint, left: QUESTIONS }
    }

    /// The size to ask for now: all that is wanted, then what may be the limit and the size above it, then the middle, and in the end what
    /// doesn't pass once more.
    fn candidate(&self, wanted: u16) -> u16 {
        if self.fails > wanted {
            return wanted;
        }
        if self.passes + 1 == self.fails {
            return self.fails;
        }
        match self.hint {
            Some(hint) if hint > self.passes && hint < self.fails => hint,
            Some(hint) if hint == self.passes => hint + 1,
            _ => self.passes + (self.fails - self.passes) / 2,
        }
    }

    /// A smaller size than what is asked for now says nothing of that: small questions are answered all the time.
    fn pass(&mut self, size: u16, wanted: u16) {
        let asked = self.candidate(wanted);
        if size >= self.fails {
            // What failed was lost by chance, or its answer was late.
            (self.fails, self.findings) = (wanted.saturating_add(1), 0);
        }
        self.passes = self.passes.max(size);
        if size >= asked || self.candidate(wanted) != asked {
            self.lost = 0;
        }
    }

    fn fail(&mut self, size: u16) {
        self.findings = if size == self.fails { self.findings + 1 } else { 1 };
        (self.fails, self.lost) = (size, 0);
    }

    /// What was found, if the check is at its end: the limit if there is one.
    fn result(&self, wanted: u16, before: Option<u16>) -> Option<Option<u16>> {
        if self.passes >= wanted {
            return Some(None);
        }
        if self.passes + 1 < self.fails {
            return None;
        }
        if self.passes < FLOOR {
            return Some(None);
        }
        let limit = Some(self.passes);
        (self.findings >= FINDINGS || before == limit).then_some(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays one check to its end; returns how many questions it took.
    fn check(path: &mut Path, mut network: impl FnMut(u16) -> Outcome) -> u32 {
        for questions in 1..=QUESTIONS {
            let size = path.ask();
            path.step(size, network(size));
            if !path.is_checked() {
                return questions;
            }
        }
        panic!("no end: {path:?}");
    }

    /// A path that loses silently what is larger.
    fn carries(limit: u16) -> impl Fn(u16) -> Outcome {
        move |size| if size <= limit { Outcome::Passed } else { Outcome::Lost }
    }

    #[test]
    fn one_question_shows_that_a_path_is_fine() {
        for limit in [1500, 1501, 9000] {
            let mut path = Path::new(1500, None);
            assert_eq!((check(&mut path, carries(limit)), path.too_small()), (1, None));
        }
    }

    #[test]
    fn the_limit_is_found_exactly() {
        for (wanted, step) in [(626, 1), (1500, 1), (9050, 13)] {
            for limit in (FLOOR..wanted).rev().step_by(step) {
                let mut path = Path::new(wanted, None);
                let questions = check(&mut path, carries(limit));
                assert_eq!(path.too_small(), Some(limit), "of {wanted}");
                assert!(questions <= 50, "{questions} for {limit} of {wanted}");
            }
        }
        let mut path = Path::new(u16::MAX, None);
        check(&mut path, carries(u16::MAX - 1));
        assert_eq!(path.too_small(), Some(u16::MAX - 1));
    }

    #[test]
    fn what_was_found_is_seen_again_by_a_few_questions() {
        let mut path = Path::new(1500, Some(1420));
        assert_eq!((check(&mut path, carries(1420)), path.too_small()), (7, Some(1420)));
        for limit in [1000, 1419, 1421, 1499] {
            check(&mut path, carries(limit));
            assert_eq!(path.too_small(), Some(limit), "it changed");
        }
        assert_eq!((check(&mut path, carries(1500)), path.too_small()), (1, None), "it was repaired");
    }

    #[test]
    fn what_is_too_big_by_a_routers_word_is_not_asked_three_times() {
        let told = |size| if size <= 1420 { Outcome::Passed } else { Outcome::TooBig(Some(1420)) };
        let mut path = Path::new(1500, None);
        assert_eq!((check(&mut path, told), path.too_small()), (4, Some(1420)), "1500, 1420, 1421, 1421");
        // It says nothing useful, or what isn't so.
        for carried in [None, Some(68), Some(1490), Some(9000)] {
            let told = |size| if size <= 1420 { Outcome::Passed } else { Outcome::TooBig(carried) };
            let mut path = Path::new(1500, None);
            check(&mut path, told);
            assert_eq!(path.too_small(), Some(1420), "{carried:?}");
        }
    }

    #[test]
    fn a_few_losses_are_not_told() {
        let mut path = Path::new(1500, None);
        for _ in 0..100 {
            for _ in 0..2 {
                let size = path.ask();
                assert_eq!(size, 1500, "nothing else is asked for");
                path.step(size, Outcome::Lost);
            }
            let size = path.ask();
            path.step(size, Outcome::Passed);
            assert_eq!((path.too_small(), path.is_checked()), (None, false));
        }
    }

    /// A burst of losses that is over before the search is.
    #[test]
    fn what_was_lost_by_chance_is_not_told() {
        for burst in 3..30 {
            let mut path = Path::new(1500, None);
            let mut asked = 0;
            check(&mut path, |_| {
                asked += 1;
                if asked <= burst { Outcome::Lost } else { Outcome::Passed }
            });
            assert_eq!(path.too_small(), None, "{burst} lost");
        }
    }

    #[test]
    fn silence_says_nothing() {
        let mut path = Path::new(1500, None);
        for _ in 0..QUESTIONS {
            let size = path.ask();
            assert_eq!(size, 1500);
            path.step(size, Outcome::Unknown);
        }
        assert_eq!((path.too_small(), path.is_checked()), (None, false), "the check came to its end");
        // Nor what comes between losses: three in a row it takes.
        for outcome in [Outcome::Lost, Outcome::Lost, Outcome::Unknown, Outcome::Lost, Outcome::Lost] {
            let size = path.ask();
            path.step(size, outcome);
        }
        assert_eq!(path.ask(), 1500);
        // What was known stays.
        let mut path = Path::new(1500, Some(1420));
        for _ in 0..QUESTIONS {
            let size = path.ask();
            path.step(size, Outcome::Unknown);
        }
        assert_eq!(path.too_small(), Some(1420));
    }

    #[test]
    fn a_late_answer_counts() {
        let mut path = Path::new(1500, None);
        for _ in 0..3 {
            let size = path.ask();
            path.step(size, Outcome::Lost);
        }
        assert!(path.ask() < 1500);
        path.step(1500, Outcome::Passed);
        assert_eq!((path.too_small(), path.is_checked()), (None, false));
        path.step(1500, Outcome::TooBig(None));
        assert_eq!(path, Path::new(1500, None), "and what is heard of no check doesn't");
    }

    #[test]
    fn where_no_large_question_passes_nothing_is_claimed() {
        for limit in [36, FLOOR - 1] {
            let mut path = Path::new(1500, None);
            check(&mut path, carries(limit));
            assert_eq!(path.too_small(), None);
        }
    }

    #[test]
    fn the_wanted_size_can_change() {
        let mut path = Path::new(1500, Some(1420));
        assert!(!path.want(1500));
        path.ask();
        assert!(path.want(9050) && !path.is_checked());
        assert_eq!(path.too_small(), Some(1420), "all the more");
        assert!(path.want(1420));
        assert_eq!(path.too_small(), None, "all that is needed passes");
    }
}
