//! mbarriers: arrivals and bytes, phase after phase.

use crate::engine::{Engine, Who};
use crate::fault::{BarrierState, Fault};

/// What an mbarrier counts.
pub struct Barrier {
    arrivals: u32,
    phase: u32,
    pending: u32,
    /// Bytes announced and not landed; negative if they land first.
    bytes: i64,
    initialised_by: usize,
    is_fenced: bool,
    waiting: Vec<usize>,
}

/// The largest number of arrivals, and of bytes.
const MAX_COUNT: u32 = (1 << 20) - 1;

/// What the shared memory of an mbarrier holds.
fn cookie(address: u32) -> [u8; 8] {
    (0x6D62_6172_7269_6572 ^ u64::from(address) << 20).to_ne_bytes()
}

fn fault(who: Who, address: u32, why: impl Into<String>) -> Fault {
    Fault::Mbarrier { thread: who.thread, place: who.place.to_string(), address, why: why.into() }
}

impl Engine {
    pub fn barrier_init(&mut self, block: usize, who: Who, address: u32, arrivals: u32) -> Result<(), Fault> {
        if !(1..=MAX_COUNT).contains(&arrivals) {
            return Err(fault(who, address, format!("initialised with {arrivals} arrivals")));
        }
        self.shared_at(block, who, address, 8, true)?;
        let barrier = Barrier {
            arrivals,
            phase: 0,
            pending: arrivals,
            bytes: 0,
            initialised_by: who.index,
            is_fenced: false,
            waiting: Vec::new(),
        };
        if self.blocks[block].barriers.insert(address, barrier).is_some() {
            return Err(fault(who, address, "initialised again"));
        }
        self.blocks[block].write(address, &cookie(address));
        Ok(())
    }

    /// `fence_barriers` of a thread.
    pub fn fence_barriers(&mut self, block: usize, thread: usize) {
        let barriers = self.blocks[block].barriers.values_mut();
        barriers
            .filter(|barrier| barrier.initialised_by == thread)
            .for_each(|barrier| barrier.is_fenced = true);
    }

    /// The barrier at an address; `needs_fence` where it is used by copies or from another block.
    pub fn barrier(
        &mut self,
        block: usize,
        who: Who,
        address: u32,
        needs_fence: bool,
    ) -> Result<&mut Barrier, Fault> {
        self.shared_at(block, who, address, 8, false)?;
        let held = self.blocks[block].read::<8>(address);
        let Some(barrier) = self.blocks[block].barriers.get_mut(&address) else {
            return Err(fault(who, address, "used before it is initialised"));
        };
        if held != cookie(address) {
            return Err(fault(who, address, "overwritten by data"));
        }
        if needs_fence && !barrier.is_fenced {
            return Err(fault(who, address, "used by copies or another block without fence_barriers"));
        }
        Ok(barrier)
    }

    /// One arrival, which makes the phase wait for `bytes` more.
    pub fn barrier_arrive(
        &mut self,
        block: usize,
        who: Who,
        address: u32,
        bytes: u32,
        is_remote: bool,
    ) -> Result<(), Fault> {
        self.check_running(block, who)?;
        let barrier = self.barrier(block, who, address, is_remote)?;
        if barrier.pending == 0 {
            let phase = barrier.phase;
            return Err(fault(who, address, format!("too many arrivals in phase {phase}")));
        }
        barrier.bytes += i64::from(bytes);
        barrier.pending -= 1;
        self.barrier_count(block, who, address)
    }

    /// `bytes` bytes of a copy have landed.
    pub fn barrier_complete(
        &mut self,
        block: usize,
        who: Who,
        address: u32,
        bytes: usize,
    ) -> Result<(), Fault> {
        self.barrier(block, who, address, true)?.bytes -= bytes as i64;
        self.barrier_count(block, who, address)
    }

    /// Completes the phase if nothing is missing.
    fn barrier_count(&mut self, block: usize, who: Who, address: u32) -> Result<(), Fault> {
        let barrier = self.blocks[block].barriers.get_mut(&address).expect("it was just found");
        if barrier.bytes.unsigned_abs() > u64::from(MAX_COUNT) {
            return Err(fault(who, address, format!("{} bytes in one phase", barrier.bytes.unsigned_abs())));
        }
        if barrier.pending == 0 && barrier.bytes == 0 {
            barrier.phase += 1;
            barrier.pending = barrier.arrivals;
            self.woken.append(&mut barrier.waiting);
        }
        Ok(())
    }

    /// Whether the phase of this parity has completed; if not, the thread is woken when the current one has.
    pub fn barrier_test(&mut self, block: usize, who: Who, address: u32, parity: u32) -> Result<bool, Fault> {
        if parity > 1 {
            return Err(fault(who, address, format!("waited for with parity {parity}")));
        }
        let barrier = self.barrier(block, who, address, false)?;
        let has_completed = barrier.phase % 2 != parity;
        if !has_completed {
            barrier.waiting.push(who.index);
        }
        Ok(has_completed)
    }

    /// For reports.
    pub fn barrier_state(&self, block: usize, address: u32) -> Option<BarrierState> {
        let &Barrier { phase, pending: arrivals, bytes, .. } = self.blocks[block].barriers.get(&address)?;
        Some(BarrierState { address, phase, arrivals, bytes })
    }
}
