//! Registers that are touched while a wgmma in flight still uses them. wgmma runs on behind the instruction that starts it, until a
//! wait retires its group; neither ptxas nor the hardware notices an instruction that overwrites its left operand meanwhile, or
//! touches its accumulators.
//!
//! Follows the code on all paths: for each instruction, the wgmmas that may be in flight before it.

use crate::sass::{Instruction, Registers, Wgmma, successors};
use std::collections::BTreeSet;

/// A wait leaves at most 7 groups in flight: what is older than the 8th is retired by every wait.
const GROUPS: usize = 8;

/// Wgmmas in flight, by their places in the code: those of the group that is not closed yet, then those of closed groups, the newest
/// first. Groups retire in order, so that a group's place in this list decides which waits retire it.
#[derive(Clone, PartialEq, Debug)]
struct InFlight(Vec<BTreeSet<usize>>);

impl InFlight {
    fn none() -> Self {
        Self(vec![BTreeSet::new()])
    }

    /// Adds what is in flight on another path, and says whether that is anything new.
    fn join(&mut self, other: &Self) -> bool {
        let before = self.clone();
        self.0.resize(self.0.len().max(other.0.len()), BTreeSet::new());
        self.0.iter_mut().zip(&other.0).for_each(|(group, others)| group.extend(others));
        *self != before
    }

    fn close_group(&mut self) {
        self.0.insert(0, BTreeSet::new());
        if self.0.len() > 1 + GROUPS
            && let Some(oldest) = self.0.pop()
        {
            self.0[GROUPS].extend(oldest);
        }
    }

    /// Waits until `count` closed groups are left.
    fn wait(&mut self, count: usize) {
        self.0.truncate(1 + count);
    }

    fn wgmmas(&self) -> BTreeSet<usize> {
        self.0.iter().flatten().copied().collect()
    }
}

/// What was found in a kernel.
#[derive(Default, Debug)]
pub struct Found {
    pub wgmmas: usize,
    /// Wgmmas that start while another one is in flight, on some path.
    pub overlapping: usize,
    pub hazards: Vec<String>,
}

impl Found {
    /// Whether several wgmmas always run one after the other, as ptxas makes them where it cannot keep track of their registers.
    pub fn is_serialised(&self) -> bool {
        self.wgmmas > 1 && self.overlapping == 0
    }
}

/// An instruction, as far as it matters here.
struct Effect {
    wgmma: Option<Wgmma>,
    waits_for: Option<usize>,
    written: Registers,
    touched: Registers,
}

impl Effect {
    fn of(instruction: &Instruction) -> Result<Self, String> {
        let wgmma = instruction.wgmma()?;
        let waits_for = if wgmma.is_some() { None } else { instruction.waits_for()? };
        let (written, touched) = instruction.registers();
        Ok(Self { wgmma, waits_for, written, touched })
    }

    /// What is in flight behind the instruction at `index` if `before` is in flight before it.
    fn apply(&self, index: usize, guarded: bool, before: &InFlight) -> InFlight {
        let mut after = before.clone();
        if let Some(count) = self.waits_for {
            after.wait(count);
        }
        if let Some(wgmma) = &self.wgmma {
            after.0[0].insert(index);
            if wgmma.commits {
                after.close_group();
            }
        }
        // It may not be executed.
        if guarded {
            after.join(before);
        }
        after
    }

    /// What is wrong with this instruction while a wgmma is in flight.
    fn conflict(&self, other: &Wgmma) -> Option<&'static str> {
        let accumulators = Registers::from(other.accumulators.clone());
        let a = Registers::from(other.a.clone().unwrap_or_default());
        if let Some(wgmma) = &self.wgmma {
            let d = Registers::from(wgmma.accumulators.clone());
            let own_a = Registers::from(wgmma.a.clone().unwrap_or_default());
            // Wgmmas on the same accumulators run in order.
            let same = wgmma.accumulators == other.accumulators;
            return (d.meets(&a) || own_a.meets(&accumulators) || d.meets(&accumulators) && !same)
                .then_some("has registers of");
        }
        if self.written.meets(&a) {
            Some("overwrites the left operand of")
        } else if self.touched.meets(&accumulators) {
            Some("touches accumulators of")
        } else {
            None
        }
    }
}

/// Looks through a kernel. An error: there is something that is not understood.
pub fn check(code: &[Instruction]) -> Result<Found, String> {
    let effects = code.iter().map(Effect::of).collect::<Result<Vec<_>, _>>()?;
    let mut found =
        Found { wgmmas: effects.iter().filter(|effect| effect.wgmma.is_some()).count(), ..Found::default() };
    if found.wgmmas == 0 {
        return Ok(found);
    }
    let successors = successors(code)?;
    // What may be in flight before each instruction; `None`: it was not reached.
    let mut before: Vec<Option<InFlight>> = vec![None; code.len()];
    before[0] = Some(InFlight::none());
    let mut changed = BTreeSet::from([0]);
    while let Some(index) = changed.pop_first() {
        let Some(state) = &before[index] else { continue };
        let after = effects[index].apply(index, code[index].guarded, state);
        for &next in &successors[index] {
            let new = match &mut before[next] {
                Some(state) => state.join(&after),
                none => {
                    *none = Some(after.clone());
                    true
                }
            };
            if new {
                changed.insert(next);
            }
        }
    }
    for (index, effect) in effects.iter().enumerate() {
        let in_flight = before[index].as_ref().map(InFlight::wgmmas).unwrap_or_default();
        found.overlapping += usize::from(effect.wgmma.is_some() && !in_flight.is_empty());
        for other in in_flight {
            if let Some(what) = effects[other].wgmma.as_ref().and_then(|wgmma| effect.conflict(wgmma)) {
                found.hazards.push(format!("{} {what} {}", code[index].text(), code[other].text()));
            }
        }
    }
    Ok(found)
}
