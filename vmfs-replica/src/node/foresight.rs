//! When a flush is to be expected. A guest that makes each of its writes durable (a database's log, a file
//! system's journal) flushes after the same number of updates again and again: then members can be asked to
//! sync together with the last of them, and have done so by the time the flush arrives. Nothing rests on it: a
//! guess that was wrong costs one sync at each member, and the next is made only when the habit has shown anew.

/// So many flushes in a row with as many updates before each make a habit.
const HABIT: u32 = 8;
/// More updates than this between two flushes are no habit: then the wait is for the data.
const UPDATES_MAX: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Foresight {
    /// Updates since the last flush, and before it.
    since: u32,
    before: u32,
    /// Flushes in a row that came after as many updates as the one before them.
    same: u32,
}

impl Foresight {
    /// An update was appended. True when a flush is to be expected next.
    pub(super) fn appended(&mut self) -> bool {
        self.since = self.since.saturating_add(1);
        if self.since > self.before {
            self.same = 0;
        }
        self.since == self.before && self.same >= HABIT
    }
    /// A flush came.
    pub(super) fn flushed(&mut self) {
        let updates = std::mem::take(&mut self.since);
        if updates == 0 {
            return;
        }
        self.same = if updates == self.before && updates <= UPDATES_MAX { self.same + 1 } else { 0 };
        self.before = updates;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many guesses are made while `updates` are appended and then flushed.
    fn round(f: &mut Foresight, updates: u32) -> usize {
        let guesses = (0..updates).filter(|_| f.appended()).count();
        f.flushed();
        guesses
    }

    #[test]
    fn a_habit_is_learnt_and_forgotten_at_once() {
        let mut f = Foresight::default();
        for updates in [1, 3, UPDATES_MAX] {
            for _ in 0..=HABIT {
                assert_eq!(round(&mut f, updates), 0, "no habit yet");
            }
            assert_eq!(round(&mut f, updates), 1);
            f.flushed();
            assert_eq!(round(&mut f, updates), 1, "a flush of nothing changes nothing");
            assert_eq!(round(&mut f, updates + 1), 1, "wrong once");
            assert_eq!(round(&mut f, updates), 0);
        }
        (0..3 * HABIT).for_each(|_| assert_eq!(round(&mut f, UPDATES_MAX + 1), 0));
        // Fewer updates than usual: the flush came before the guess.
        (0..=HABIT).for_each(|_| assert_eq!(round(&mut f, 2), 0));
        assert_eq!(round(&mut f, 1), 0);
        assert_eq!(round(&mut f, 2), 0);
    }
}
