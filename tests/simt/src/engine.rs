//! What works beside the threads of a cluster: its shared memories and what the async proxy sees of them, mbarriers
//! (mbarrier.rs), copies (async_copy.rs) and wgmmas (wgmma.rs).

use crate::async_copy::{Load, Store, StoreGroups};
use crate::fault::{Access, Fault, Thread};
use crate::hooks::{Place, SHARED, WARP};
use crate::machine::Dice;
use crate::mbarrier::Barrier;
use crate::memory::{Memory, POISON};
use crate::tensor_map::CHUNK;
use crate::wgmma::Warpgroup;
use std::collections::BTreeMap;
use std::ops::Range;

/// Shared address of a block's dynamic shared memory.
pub const SHARED_BASE: u32 = 1024;
/// Threads that wgmma takes together.
pub const WARPGROUP: usize = 4 * WARP;

/// A thread at a line of a kernel.
#[derive(Clone, Copy)]
pub struct Who {
    /// Its number in the cluster.
    pub index: usize,
    pub thread: Thread,
    pub place: Place,
}

impl Who {
    pub fn instruction(self, why: impl Into<String>) -> Fault {
        Fault::Instruction { thread: self.thread, place: self.place.to_string(), why: why.into() }
    }
}

/// A block's shared memory.
pub struct BlockMemory {
    data: *mut u8,
    bytes: usize,
    /// What the async proxy sees.
    view: Vec<u8>,
    pub barriers: BTreeMap<u32, Barrier>,
    /// What each thread has written and not fenced: shared addresses.
    writes: Vec<Vec<Range<u32>>>,
    running: usize,
}

impl BlockMemory {
    /// Host address of a shared one that was checked.
    fn host(&self, address: u32) -> *mut u8 {
        self.data.wrapping_add((address - SHARED_BASE) as usize)
    }

    pub fn read<const N: usize>(&self, address: u32) -> [u8; N] {
        // SAFETY: the address was checked, and threads that could write are not running.
        unsafe { self.host(address).cast::<[u8; N]>().read_unaligned() }
    }

    /// As the generic proxy writes.
    pub fn write(&self, address: u32, bytes: &[u8]) {
        // SAFETY: the address was checked, and nobody refers to this memory now.
        unsafe { self.host(address).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// As the async proxy writes; both proxies see it.
    pub fn write_async(&mut self, address: u32, bytes: &[u8; CHUNK]) {
        self.write(address, bytes);
        self.view()[(address - SHARED_BASE) as usize..][..CHUNK].copy_from_slice(bytes);
    }

    fn view(&mut self) -> &mut [u8] {
        // Kernels without an async proxy have no use for it.
        self.view.resize(self.bytes, POISON);
        &mut self.view
    }
}

pub struct Engine {
    pub memory: *const Memory,
    /// Where the kernel's parameters are.
    pub params: Range<usize>,
    pub blocks: Vec<BlockMemory>,
    indices: Vec<[u32; 3]>,
    block_dim: [u32; 3],
    pub per_block: usize,
    pub dice: Dice,
    /// One of so many switches of threads moves something on; 0: nothing is done before somebody waits for it.
    pace: usize,
    pub loads: Vec<Load>,
    pub stores: Vec<Store>,
    pub store_groups: Vec<StoreGroups>,
    pub warpgroups: Vec<Warpgroup>,
    /// What each warpgroup has set its registers to last.
    registers: BTreeMap<usize, (Who, u32)>,
    /// Threads whose mbarrier's phase has completed.
    pub woken: Vec<usize>,
}

impl Engine {
    /// For blocks with these indices and shared memories of `bytes` bytes.
    pub fn new(
        memory: *const Memory,
        params: Range<usize>,
        block_dim: [u32; 3],
        blocks: &[([u32; 3], *mut u8)],
        bytes: usize,
        mut dice: Dice,
    ) -> Self {
        let per_block = block_dim.iter().product::<u32>() as usize;
        let memories = blocks.iter().map(|&(_, data)| BlockMemory {
            data,
            bytes,
            view: Vec::new(),
            barriers: BTreeMap::new(),
            writes: Vec::new(),
            running: per_block,
        });
        // In order: the first.
        let pace = [0, 2, 8, 32][dice.roll(4)];
        Self {
            memory,
            params,
            blocks: memories.collect(),
            indices: blocks.iter().map(|&(index, _)| index).collect(),
            block_dim,
            per_block,
            dice,
            pace,
            loads: Vec::new(),
            stores: Vec::new(),
            store_groups: Vec::new(),
            warpgroups: Vec::new(),
            registers: BTreeMap::new(),
            woken: Vec::new(),
        }
    }

    /// A thread by its number in the cluster.
    pub fn thread(&self, index: usize) -> Thread {
        let [width, height, _] = self.block_dim;
        let within = (index % self.per_block) as u32;
        let thread = [within % width, within / width % height, within / (width * height)];
        Thread { block: self.indices[index / self.per_block], thread }
    }

    /// Checks an access to shared memory, and gives the host's address.
    pub fn shared_at(
        &self,
        block: usize,
        who: Who,
        address: u32,
        bytes: usize,
        is_write: bool,
    ) -> Result<*mut u8, Fault> {
        let offset = i64::from(address) - i64::from(SHARED_BASE);
        let memory = &self.blocks[block];
        let access = Access { offset, bytes, is_write };
        if offset < 0 || offset as usize + bytes > memory.bytes {
            return Err(Fault::OutOfBounds { thread: who.thread, access, tensor: SHARED.to_owned() });
        }
        if !address.is_multiple_of(bytes as u32) {
            return Err(Fault::Misaligned { thread: who.thread, access, tensor: SHARED.to_owned() });
        }
        Ok(memory.host(address))
    }

    /// Notes that a thread writes there through the generic proxy.
    pub fn note_write(&mut self, block: usize, thread: usize, address: u32, bytes: u32) {
        let (per_block, writes) = (self.per_block, &mut self.blocks[block].writes);
        writes.resize(per_block, Vec::new());
        let writes = &mut writes[thread % per_block];
        match writes.last_mut() {
            Some(last) if last.end == address => last.end += bytes,
            _ => writes.push(address..address + bytes),
        }
    }

    /// `fence_async_proxy` of a thread.
    pub fn fence_async_proxy(&mut self, block: usize, thread: usize) {
        let (per_block, block) = (self.per_block, &mut self.blocks[block]);
        let Some(writes) = block.writes.get_mut(thread % per_block) else { return };
        for range in std::mem::take(writes) {
            for address in range {
                let [byte] = block.read(address);
                block.view()[(address - SHARED_BASE) as usize] = byte;
            }
        }
    }

    /// 16 bytes as the async proxy reads them.
    pub fn read_async(&mut self, block: usize, who: Who, address: u32) -> Result<[u8; CHUNK], Fault> {
        self.shared_at(block, who, address, CHUNK, false)?;
        let memory = &mut self.blocks[block];
        let bytes = memory.read::<CHUNK>(address);
        let seen = &memory.view()[(address - SHARED_BASE) as usize..][..CHUNK];
        if bytes == seen {
            return Ok(bytes);
        }
        let differs = (0..CHUNK).find(|&i| bytes[i] != seen[i]).expect("they differ");
        let address = address + differs as u32;
        let wrote = |writes: &Vec<Range<u32>>| writes.iter().any(|range| range.contains(&address));
        let writer = memory.writes.iter().position(wrote);
        Err(Fault::MissingProxyFence {
            thread: who.thread,
            place: who.place.to_string(),
            address,
            writer: writer.map(|writer| self.thread(block * self.per_block + writer)),
        })
    }

    /// Whether an operation is done as soon as it is issued, and, if not, whether only when somebody waits for it.
    pub fn haste(&mut self) -> (bool, bool) {
        match self.pace {
            0 => (false, true),
            _ => [(false, false), (false, true), (false, false), (true, false)][self.dice.roll(4)],
        }
    }

    /// Sometimes moves something on; between any two threads.
    pub fn tick(&mut self) -> Result<(), Fault> {
        if self.pace == 0 || self.dice.roll(self.pace) != 0 {
            return Ok(());
        }
        let (loads, stores, groups) = (self.loads.len(), self.stores.len(), self.warpgroups.len());
        let choice = self.dice.roll((loads + stores + groups).max(1));
        if choice < loads {
            if !self.loads[choice].is_late {
                self.land_piece(choice)?;
            }
        } else if choice < loads + stores {
            if !self.stores[choice - loads].is_late {
                self.advance_store(choice - loads)?;
            }
        } else if choice < loads + stores + groups {
            let group = choice - loads - stores;
            if self.warpgroups[group].is_next_early() {
                self.execute_next(group)?;
            }
        }
        Ok(())
    }

    /// Moves something on that a thread may be waiting for; no thread can run. False if there is nothing.
    pub fn force(&mut self) -> Result<bool, Fault> {
        if self.loads.is_empty() {
            return Ok(false);
        }
        let choice = self.dice.roll(self.loads.len());
        self.land_piece(choice)?;
        Ok(true)
    }

    /// A block of the cluster must not be used after it has ended.
    pub fn check_running(&self, block: usize, who: Who) -> Result<(), Fault> {
        match self.blocks[block].running {
            0 => Err(Fault::EndedEarly {
                thread: who.thread,
                why: format!(
                    "at {} uses block {:?} of its cluster, which has ended",
                    who.place, self.indices[block]
                ),
            }),
            _ => Ok(()),
        }
    }

    /// A thread has returned.
    pub fn end_thread(&mut self, index: usize) -> Result<(), Fault> {
        let ended = |why: String| Fault::EndedEarly { thread: self.thread(index), why };
        if self.has_unread_stores(index) {
            return Err(ended("returns before its stores have read shared memory".into()));
        }
        if let Some(place) = self.wgmma_in_flight(index) {
            return Err(ended(format!("returns before the wgmma at {place} was waited for")));
        }
        let block = index / self.per_block;
        if self.blocks[block].running == 1
            && let Some(load) = self.loads.iter().find(|load| load.block == block)
        {
            let Who { thread, place, .. } = load.who;
            return Err(ended(format!(
                "returns, the last of its block, before the copy of {thread} at {place} has landed there"
            )));
        }
        self.blocks[block].running -= 1;
        Ok(())
    }

    /// The warpgroup that begins with this thread has so many registers per thread from here on.
    pub fn set_registers(&mut self, first: usize, who: Who, count: u32) {
        self.registers.insert(first / WARPGROUP, (who, count));
    }

    /// Registers that one warpgroup of a block gets, others have to give back: it would wait for them.
    fn check_registers(&self) -> Result<(), Fault> {
        /// Of a multiprocessor, whose only block this is.
        const ALL: usize = 65_536;
        let groups = self.per_block / WARPGROUP;
        let at_start = (ALL / self.per_block / 8 * 8).min(248);
        for block in 0..self.blocks.len() {
            let set = |group| self.registers.get(&(block * groups + group));
            let total: usize =
                (0..groups).map(|group| set(group).map_or(at_start, |set| set.1 as usize)).sum();
            let largest = (0..groups).filter_map(set).max_by_key(|set| set.1);
            if let Some(&(who, count)) = largest.filter(|_| total > at_start * groups) {
                return Err(who.instruction(format!(
                    "setmaxnreg to {count} registers waits: the block's warpgroups want {total} of {}",
                    at_start * groups
                )));
            }
        }
        Ok(())
    }

    /// All threads have returned.
    pub fn finish(&mut self) -> Result<(), Fault> {
        while !self.stores.is_empty() {
            self.advance_store(0)?;
        }
        self.check_registers()
    }
}
