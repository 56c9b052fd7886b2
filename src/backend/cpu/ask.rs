//! What a thread asks of memory while it goes through the panels of an operation.

use super::ahead::{Ahead, Runs, Spans};
use super::team::Pieces;
use std::ops::Range;

/// How one thread reads an operation's panels, which are pieces of work in the order that they lie in.
pub(super) struct Reading<'a> {
    /// Whether few rows take them, see [`super::kernel::Kernel::few`].
    pub(super) few: bool,
    pub(super) pieces: &'a Pieces,
    pub(super) thread: usize,
    /// What the thread will read in the next operation, if that is known.
    pub(super) next: Option<Spans>,
}

/// What memory is asked for while neighbouring panels are multiplied.
#[derive(Clone, Copy)]
pub(super) struct Ask {
    pub(super) few: bool,
    /// Whether the panels are touched for the first time.
    pub(super) fresh: bool,
    /// What to ask for from now on, if anything new.
    pub(super) next: Option<Spans>,
    /// [`super::tile::Tile::spread`] and [`super::tile::Tile::then`].
    pub(super) spread: usize,
    pub(super) then: Option<usize>,
}

impl Reading<'_> {
    /// While these pieces are multiplied: few rows ask for what lies a little ahead, and all the time for the beginning of the
    /// next operation; many for the next panel, which `following` gives.
    pub(super) fn asking(&self, pieces: Range<usize>, following: impl Fn() -> Range<usize>) -> Ask {
        let Self { few, thread, .. } = *self;
        let last = self.pieces.begins_at(pieces.end);
        if !few {
            let next = if last { self.next } else { Some([Runs::whole(following()), Runs::default()]) };
            return Ask { few, fresh: true, next, spread: pieces.len(), then: None };
        }
        let own = self.pieces.start_of(thread)..self.pieces.start_of(thread + 1);
        let spread = if own.contains(&pieces.start) { own.end - pieces.start } else { pieces.len() };
        let then = if last { self.next.map(|[_, panels]| panels.start) } else { Some(following().start) };
        Ask { few, fresh: true, next: self.next.filter(|_| pieces.start == own.start), spread, then }
    }
}

impl Ask {
    /// Says to `ahead` what is wanted from now on.
    pub(super) fn begin(&self, ahead: &Ahead) {
        match &self.next {
            Some(next) if self.few => ahead.set_beginning(next),
            Some(next) => ahead.set(next),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::team::Team;

    /// Panels of 100 bytes, ten of them, of which either thread has five.
    fn asking(few: bool, thread: usize, pieces: Range<usize>) -> Ask {
        let (team, following) = (Team::new(2), pieces.end * 100..(pieces.end + 1) * 100);
        let next = Some([Runs::default(), Runs::whole(9000..9500)]);
        Reading { few, pieces: &team.pieces(10), thread, next }.asking(pieces, || following.clone())
    }

    #[test]
    fn few_rows_ask_for_the_next_operation_during_all_of_their_panels() {
        let first = asking(true, 1, 5..7);
        assert_eq!((first.spread, first.then), (5, Some(700)));
        assert_eq!(first.next, Some([Runs::default(), Runs::whole(9000..9500)]));
        let second = asking(true, 1, 7..10);
        assert_eq!((second.spread, second.then, second.next), (3, Some(9000), None));
        // Taken from the other thread, which has asked.
        let taken = asking(true, 0, 8..9);
        assert_eq!((taken.spread, taken.then, taken.next), (1, Some(900), None));
    }

    #[test]
    fn many_rows_ask_for_the_next_panel_and_after_the_last_for_the_next_operation() {
        let asked = |pieces| asking(false, 0, pieces).next;
        assert_eq!(asked(0..1), Some([Runs::whole(100..200), Runs::default()]));
        assert_eq!(asked(4..5), Some([Runs::default(), Runs::whole(9000..9500)]));
    }
}
