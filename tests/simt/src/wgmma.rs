//! wgmma: what a warpgroup has issued, the registers that it uses meanwhile, and when it is carried out.
//!
//! From issue to retirement the threads' accumulators hold poison and the true ones lie here.

use crate::engine::{Engine, WARPGROUP, Who};
use crate::fault::Fault;
use crate::hooks::{Place, WARP};
use crate::tile::{A_ELEMENTS, K, ROWS, Tile, b_at, decode, multiply};
use std::collections::VecDeque;

/// What a thread brings: `Operands` of sm90.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Operands {
    d: *mut f32,
    a: *const [u32; 4],
    a_tile: u64,
    b_tile: u64,
    n: u32,
    accumulate: u32,
    is_a_transposed: u32,
    is_b_transposed: u32,
    is_bf16: u32,
}

impl Operands {
    /// What has to be the same in all threads.
    fn common(&self) -> (u64, u64, [u32; 5], bool) {
        let flags = [self.n, self.accumulate, self.is_a_transposed, self.is_b_transposed, self.is_bf16];
        (self.a_tile, self.b_tile, flags, self.a.is_null())
    }
}

/// NaN of a pattern that no arithmetic makes.
const POISON: u32 = 0x7FBA_DBAD;

/// Accumulators of a warpgroup.
struct Accumulators {
    /// Where each thread has them.
    at: Vec<*mut f32>,
    n: usize,
    /// `[WARPGROUP, n / 2]`: the true ones while in flight, otherwise as at the last fence.
    values: Vec<f32>,
    in_flight: usize,
}

/// A registers of a warpgroup.
struct Fragments {
    at: Vec<*const [u32; 4]>,
    /// As at the last fence.
    values: Vec<[u32; 4]>,
}

enum Source {
    Tile(u64),
    Registers { at: Vec<*const [u32; 4]>, values: Vec<[u32; 4]> },
}

struct Wgmma {
    who: Who,
    operands: Operands,
    a: Source,
    /// Where its thread 0 has the accumulators.
    d: *mut f32,
    group: usize,
    is_late: bool,
}

/// A warpgroup that has something to do with wgmma.
pub struct Warpgroup {
    /// Its first thread in the cluster.
    first: usize,
    is_fenced: bool,
    accumulators: Vec<Accumulators>,
    fragments: Vec<Fragments>,
    /// In order; the first `executed` are carried out.
    issued: VecDeque<Wgmma>,
    executed: usize,
    /// How many groups are closed.
    closed: usize,
}

/// Row and column of element `i` of the A registers of a thread.
fn fragment_at(thread: usize, i: usize) -> (usize, usize) {
    let (warp, group, within) = (thread / WARP, thread % WARP / 4, thread % 4);
    (16 * warp + group + 8 * (i / 2 % 2), 2 * within + 8 * (i / 4) + i % 2)
}

impl Accumulators {
    /// Those that the threads have.
    fn gather(at: &[*mut f32], n: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(WARPGROUP * n / 2);
        for &at in at {
            if crate::IS_SANITIZED {
                // The array may be out of scope: no business of the sanitizer, which watches copies.
                // SAFETY: the thread's stack is there, and this part of it was an array of n / 2 floats.
                values.extend((0..n / 2).map(|i| unsafe { at.add(i).read_volatile() }));
            } else {
                // SAFETY: as above.
                values.extend_from_slice(unsafe { std::slice::from_raw_parts(at, n / 2) });
            }
        }
        values
    }

    /// What each thread has is of this size.
    fn each(&self) -> usize {
        self.n / 2
    }

    /// Takes them away from the threads.
    fn poison(&self) {
        for &at in &self.at {
            // SAFETY: the thread waits or has just issued this, and its array has n / 2 floats.
            unsafe { std::slice::from_raw_parts_mut(at, self.each()) }.fill(f32::from_bits(POISON));
        }
    }

    /// Gives them to the threads.
    fn give_back(&self) {
        for (&at, values) in self.at.iter().zip(self.values.chunks_exact(self.each())) {
            // SAFETY: the thread waits, and its array has n / 2 floats.
            unsafe { std::slice::from_raw_parts_mut(at, self.each()) }.copy_from_slice(values);
        }
    }

    /// The first thread that has something else than poison.
    fn not_poison(&self) -> Option<usize> {
        let now = Self::gather(&self.at, self.n);
        Some(now.iter().position(|now| now.to_bits() != POISON)? / self.each())
    }

    /// The first thread that has something else than the values.
    fn changed(&self) -> Option<usize> {
        let now = Self::gather(&self.at, self.n);
        let is_other = |(now, value): (&f32, &f32)| now.to_bits() != value.to_bits();
        Some(now.iter().zip(&self.values).position(is_other)? / self.each())
    }

    /// Whether the arrays have a register in common.
    fn overlaps(&self, at: &[*mut f32], n: usize) -> bool {
        let disjoint = |(&own, &other): (&*mut f32, &*mut f32)| {
            own as usize + 2 * self.n <= other as usize || other as usize + 2 * n <= own as usize
        };
        !self.at.iter().zip(at).all(disjoint)
    }
}

impl Fragments {
    fn gather(at: &[*const [u32; 4]]) -> Vec<[u32; 4]> {
        // SAFETY: the threads' stacks are there, and these parts of them were arrays of four registers.
        at.iter().map(|&at| unsafe { at.read_volatile() }).collect()
    }
}

impl Warpgroup {
    /// Whether the next one may be carried out before anybody waits for it.
    pub fn is_next_early(&self) -> bool {
        self.issued.get(self.executed).is_some_and(|next| !next.is_late)
    }
}

impl Engine {
    fn warpgroup(&mut self, first: usize) -> usize {
        let known = self.warpgroups.iter().position(|group| group.first == first);
        known.unwrap_or_else(|| {
            self.warpgroups.push(Warpgroup {
                first,
                is_fenced: false,
                accumulators: Vec::new(),
                fragments: Vec::new(),
                issued: VecDeque::new(),
                executed: 0,
                closed: 0,
            });
            self.warpgroups.len() - 1
        })
    }

    /// `wgmma_fence` of the warpgroup that starts at a thread.
    pub fn wgmma_fence(&mut self, first: usize) {
        let group = self.warpgroup(first);
        let group = &mut self.warpgroups[group];
        group.is_fenced = true;
        for accumulators in group.accumulators.iter_mut().filter(|known| known.in_flight == 0) {
            accumulators.values = Accumulators::gather(&accumulators.at, accumulators.n);
        }
        for fragments in &mut group.fragments {
            fragments.values = Fragments::gather(&fragments.at);
        }
    }

    /// `wgmma_commit`.
    pub fn wgmma_commit(&mut self, first: usize) {
        let group = self.warpgroup(first);
        self.warpgroups[group].closed += 1;
    }

    /// Issues a wgmma; `operands` are those of the threads from `who` on.
    pub fn wgmma(&mut self, who: Who, operands: &[Operands]) -> Result<(), Fault> {
        if let Some(other) = (1..WARPGROUP).find(|&i| operands[i].common() != operands[0].common()) {
            return Err(Fault::WarpgroupDivergence {
                waiting: who.thread,
                place: who.place.to_string(),
                other: self.thread(who.index + other),
                otherwise: "brings other descriptors or flags".into(),
            });
        }
        let group = self.warpgroup(who.index);
        if !self.warpgroups[group].is_fenced {
            return Err(missing_fence(who, "registers"));
        }
        let n = operands[0].n as usize;
        self.take_accumulators(group, who, operands.iter().map(|operands| operands.d).collect(), n)?;
        let a = match operands[0].a.is_null() {
            true => Source::Tile(operands[0].a_tile),
            false => self.take_fragments(group, who, operands.iter().map(|operands| operands.a).collect())?,
        };
        let (is_early, is_late) = self.haste();
        let state = &mut self.warpgroups[group];
        let (operands, d) = (operands[0], operands[0].d);
        state.issued.push_back(Wgmma { who, operands, a, d, group: state.closed, is_late });
        while is_early && self.warpgroups[group].executed < self.warpgroups[group].issued.len() {
            self.execute_next(group)?;
        }
        Ok(())
    }

    /// Takes accumulators away from the threads.
    fn take_accumulators(
        &mut self,
        group: usize,
        who: Who,
        at: Vec<*mut f32>,
        n: usize,
    ) -> Result<(), Fault> {
        let known = &mut self.warpgroups[group].accumulators;
        // Of arrays that are no more.
        known
            .retain(|other| other.in_flight > 0 || other.at == at && other.n == n || !other.overlaps(&at, n));
        if let Some(same) = known.iter().position(|other| other.at == at && other.n == n) {
            let accumulators = &known[same];
            if accumulators.in_flight == 0 {
                if let Some(thread) = accumulators.changed() {
                    let who = Who { thread: self.thread(who.index + thread), ..who };
                    return Err(missing_fence(who, "accumulators"));
                }
                accumulators.poison();
            }
            self.warpgroups[group].accumulators[same].in_flight += 1;
            return Ok(());
        }
        if known.iter().any(|other| other.overlaps(&at, n)) {
            return Err(who.instruction("accumulators that overlap with others in flight"));
        }
        let values = Accumulators::gather(&at, n);
        let accumulators = Accumulators { at, n, values, in_flight: 1 };
        accumulators.poison();
        known.push(accumulators);
        Ok(())
    }

    /// Notes what A registers hold.
    fn take_fragments(&mut self, group: usize, who: Who, at: Vec<*const [u32; 4]>) -> Result<Source, Fault> {
        let values = Fragments::gather(&at);
        let known = &mut self.warpgroups[group].fragments;
        let overlaps = |other: &Fragments| {
            other.at.iter().zip(&at).any(|(&one, &other)| (one as usize).abs_diff(other as usize) < 16)
        };
        known.retain(|other| other.at == at || !overlaps(other));
        match known.iter().find(|other| other.at == at) {
            Some(same) => {
                if let Some(thread) = (0..WARPGROUP).find(|&i| same.values[i] != values[i]) {
                    let who = Who { thread: self.thread(who.index + thread), ..who };
                    return Err(missing_fence(who, "A registers"));
                }
            }
            None => known.push(Fragments { at: at.clone(), values: values.clone() }),
        }
        Ok(Source::Registers { at, values })
    }

    /// Carries out a warpgroup's next wgmma.
    pub fn execute_next(&mut self, group: usize) -> Result<(), Fault> {
        let state = &self.warpgroups[group];
        let block = state.first / self.per_block;
        let Wgmma { who, operands, a, d, .. } = &state.issued[state.executed];
        let (who, d, n, is_bf16) = (*who, *d, operands.n as usize, operands.is_bf16 != 0);
        let accumulate = operands.accumulate != 0;
        let tile_b =
            Tile { descriptor: operands.b_tile, is_transposed: operands.is_b_transposed != 0, is_bf16 };
        let mut left = [[0.0; K]; ROWS];
        match a {
            Source::Registers { values, .. } => {
                for (thread, registers) in values.iter().enumerate() {
                    for i in 0..A_ELEMENTS {
                        let (row, k) = fragment_at(thread, i);
                        let bits = (registers[i / 2] >> (16 * (i % 2))) as u16;
                        left[row][k] = decode(bits, is_bf16);
                    }
                }
            }
            &Source::Tile(descriptor) => {
                let is_transposed = operands.is_a_transposed != 0;
                let tile = Tile { descriptor, is_transposed, is_bf16 };
                self.read_tile(block, who, &tile, ROWS, |row, k, value| left[row][k] = value)?;
            }
        }
        let mut right = vec![0.0; K * n];
        self.read_tile(block, who, &tile_b, n, |column, k, value| right[b_at(k, column)] = value)?;
        let state = &mut self.warpgroups[group];
        state.executed += 1;
        let accumulators =
            state.accumulators.iter_mut().find(|known| known.at[0] == d && known.in_flight > 0);
        let accumulators = accumulators.expect("they stay until the wgmma is retired");
        multiply(&left, &right, &mut accumulators.values, accumulate);
        Ok(())
    }

    /// Retires all but the last `pending` closed groups: gives the threads their accumulators.
    pub fn wgmma_wait(&mut self, who: Who, pending: u32) -> Result<(), Fault> {
        if pending > 7 {
            return Err(who.instruction(format!("wgmma_wait<{pending}>")));
        }
        let group = self.warpgroup(who.index);
        let end = self.warpgroups[group].closed.saturating_sub(pending as usize);
        while self.warpgroups[group].issued.front().is_some_and(|first| first.group < end) {
            if self.warpgroups[group].executed == 0 {
                self.execute_next(group)?;
            }
            let state = &mut self.warpgroups[group];
            let wgmma = state.issued.pop_front().expect("it has a front");
            state.executed -= 1;
            let at = |engine: &Self, thread| Who { thread: engine.thread(who.index + thread), ..wgmma.who };
            if let Source::Registers { at: registers, values } = &wgmma.a {
                let now = Fragments::gather(registers);
                if let Some(thread) = (0..WARPGROUP).find(|&i| now[i] != values[i]) {
                    return Err(in_flight(at(self, thread), "A registers"));
                }
            }
            let mut known = self.warpgroups[group].accumulators.iter_mut();
            let accumulators = known
                .find(|known| known.at[0] == wgmma.d && known.in_flight > 0)
                .expect("they stay until the wgmma is retired");
            accumulators.in_flight -= 1;
            if accumulators.in_flight == 0 {
                if let Some(thread) = accumulators.not_poison() {
                    return Err(in_flight(at(self, thread), "accumulators"));
                }
                accumulators.give_back();
            }
        }
        Ok(())
    }

    /// Where a wgmma of the thread's warpgroup was issued that nobody has waited for.
    pub fn wgmma_in_flight(&self, thread: usize) -> Option<Place> {
        let own = |group: &&Warpgroup| (group.first..group.first + WARPGROUP).contains(&thread);
        Some(self.warpgroups.iter().find(own)?.issued.front()?.who.place)
    }
}

fn missing_fence(who: Who, registers: &'static str) -> Fault {
    Fault::MissingWgmmaFence { thread: who.thread, place: who.place.to_string(), registers }
}

fn in_flight(who: Who, registers: &'static str) -> Fault {
    Fault::RegistersInFlight { thread: who.thread, place: who.place.to_string(), registers }
}
