//! Copies of boxes between global and shared memory (TMA): checked when they are issued, carried out later, in pieces.

use crate::engine::{Engine, Who};
use crate::fault::Fault;
use crate::tensor_map::{CHUNK, TensorMap, swizzled, tile_alignment};

/// A copy to the shared memory of one block.
pub struct Load {
    pub who: Who,
    /// Where it lands.
    pub block: usize,
    /// Whether it waits until nothing else can go on.
    pub is_late: bool,
    to: u32,
    barrier: u32,
    map: TensorMap,
    corner: [i32; 3],
    /// Ranges of rows that have not landed.
    pieces: Vec<(usize, usize)>,
}

/// A copy from shared memory, of a thread's group `group`.
pub struct Store {
    who: Who,
    group: usize,
    block: usize,
    pub is_late: bool,
    from: u32,
    map: TensorMap,
    corner: [i32; 3],
    /// The rows, once they are read.
    rows: Option<Vec<u8>>,
}

/// A thread's groups of stores, by number.
#[derive(Clone, Copy, Default)]
pub struct StoreGroups {
    /// How many are closed.
    closed: usize,
    /// Of how many the reads were waited for.
    waited: usize,
    /// The one with the last store.
    last: Option<usize>,
}

impl Engine {
    /// The map at an address, if it is one that can be used.
    pub fn tensor_map(&self, who: Who, address: usize) -> Result<TensorMap, Fault> {
        let is_param = self.params.start <= address && address + size_of::<TensorMap>() <= self.params.end;
        if !is_param || !address.is_multiple_of(align_of::<TensorMap>()) {
            return Err(who.instruction("a tensor map that is not in the kernel's parameters"));
        }
        // SAFETY: it lies in the parameters, which outlive the launch, and any bytes are a description.
        let map = unsafe { (address as *const TensorMap).read() };
        map.check().map_err(|why| who.instruction(why))?;
        Ok(map)
    }

    /// Checks that a box fits at an address of shared memory.
    fn check_tile(&self, block: usize, who: Who, address: u32, map: &TensorMap) -> Result<(), Fault> {
        let alignment = tile_alignment(map.swizzle);
        if !address.is_multiple_of(alignment) {
            let swizzle = map.swizzle;
            return Err(who.instruction(format!(
                "a box at shared address {address:#x}, no multiple of {alignment}, swizzled by {swizzle} bytes"
            )));
        }
        self.shared_at(block, who, address, CHUNK, false)?;
        // Swizzling may reach the end of the last span.
        let bytes = map.box_bytes().next_multiple_of(CHUNK.max(map.swizzle as usize));
        let last = address.saturating_add((bytes - CHUNK) as u32);
        self.shared_at(block, who, last, CHUNK, false).map(|_| ())
    }

    /// Starts a copy to `to` of each block in `ranks`, or of the own one if that is `None`.
    pub fn copy_box(
        &mut self,
        who: Who,
        ranks: Option<u32>,
        to: u32,
        map: usize,
        barrier: u32,
        corner: [i32; 3],
    ) -> Result<(), Fault> {
        let map = self.tensor_map(who, map)?;
        let ranks = ranks.unwrap_or(1 << (who.index / self.per_block));
        if ranks == 0 || u64::from(ranks) >> self.blocks.len() != 0 {
            return Err(who.instruction(format!("a copy to blocks {ranks:#b} of {}", self.blocks.len())));
        }
        for block in (0..self.blocks.len()).filter(|block| ranks >> block & 1 == 1) {
            self.check_running(block, who)?;
            self.check_tile(block, who, to, &map)?;
            self.barrier(block, who, barrier, true)?;
            let rows = map.rows();
            let each = rows.div_ceil(rows.min(4 + self.dice.roll(5)));
            let pieces = (0..rows).step_by(each).map(|first| (first, rows.min(first + each))).collect();
            let (is_early, is_late) = self.haste();
            self.loads.push(Load { who, block, is_late, to, barrier, map, corner, pieces });
            if is_early {
                let load = self.loads.len() - 1;
                while self.land_piece(load)? {}
            }
        }
        Ok(())
    }

    /// Lands a piece of a copy. False if that was the last one: the copy is gone.
    pub fn land_piece(&mut self, load: usize) -> Result<bool, Fault> {
        let pieces = self.loads[load].pieces.len();
        let choice = self.dice.roll(pieces);
        let (first, end) = self.loads[load].pieces.swap_remove(choice);
        let Load { who, block, to, barrier, map, corner, .. } = self.loads[load];
        if pieces == 1 {
            self.loads.swap_remove(load);
        }
        let row_bytes = map.row_bytes();
        let mut bytes = vec![0; row_bytes];
        for row in first..end {
            bytes.fill(0);
            if let Some(part) = map.row(corner, row) {
                // SAFETY: the memory outlives the launch.
                let memory = unsafe { &*self.memory };
                let alignment = map.element_bytes as usize;
                memory.access_aligned(who.thread, part.address, part.bytes, alignment, false)?;
                let to = &mut bytes[part.skipped..][..part.bytes];
                // SAFETY: the access was just found to lie in a tensor, of which the row is no part.
                unsafe { to.as_mut_ptr().copy_from_nonoverlapping(part.address as *const u8, part.bytes) };
            }
            for (i, chunk) in bytes.as_chunks().0.iter().enumerate() {
                let address = to + (row * row_bytes + i * CHUNK) as u32;
                self.blocks[block].write_async(swizzled(address, map.swizzle), chunk);
            }
        }
        self.barrier_complete(block, who, barrier, (end - first) * row_bytes)?;
        Ok(pieces > 1)
    }

    /// Starts a copy from `from` of the thread's block.
    pub fn store_box(&mut self, who: Who, map: usize, from: u32, corner: [i32; 3]) -> Result<(), Fault> {
        let (map, block) = (self.tensor_map(who, map)?, who.index / self.per_block);
        self.check_tile(block, who, from, &map)?;
        let groups = self.store_groups_of(who.index);
        let group = groups.closed;
        groups.last = Some(group);
        let (is_early, is_late) = self.haste();
        self.stores.push(Store { who, group, block, is_late, from, map, corner, rows: None });
        if is_early {
            let store = self.stores.len() - 1;
            self.advance_store(store)?;
        }
        Ok(())
    }

    fn store_groups_of(&mut self, thread: usize) -> &mut StoreGroups {
        let threads = self.blocks.len() * self.per_block;
        self.store_groups.resize(threads, StoreGroups::default());
        &mut self.store_groups[thread]
    }

    /// Closes a thread's group.
    pub fn commit_stores(&mut self, thread: usize) {
        self.store_groups_of(thread).closed += 1;
    }

    /// Carries out what is left of all but the last `pending` closed groups of a thread, or of their reads.
    pub fn wait_for_stores(&mut self, thread: usize, pending: usize, reads_only: bool) -> Result<(), Fault> {
        let groups = self.store_groups_of(thread);
        let end = groups.closed.saturating_sub(pending);
        groups.waited = groups.waited.max(end);
        let is_awaited = |store: &Store| {
            store.who.index == thread && store.group < end && !(reads_only && store.rows.is_some())
        };
        while let Some(store) = self.stores.iter().position(is_awaited) {
            self.advance_store(store)?;
        }
        Ok(())
    }

    /// Reads what a store reads or, if it has, writes it: then the store is gone.
    pub fn advance_store(&mut self, store: usize) -> Result<(), Fault> {
        let Store { who, block, from, map, corner, .. } = self.stores[store];
        let row_bytes = map.row_bytes();
        if self.stores[store].rows.is_none() {
            let mut rows = Vec::with_capacity(map.box_bytes());
            for chunk in 0..map.box_bytes() / CHUNK {
                let address = swizzled(from + (chunk * CHUNK) as u32, map.swizzle);
                rows.extend(self.read_async(block, who, address)?);
            }
            self.stores[store].rows = Some(rows);
            return Ok(());
        }
        let rows = self.stores.swap_remove(store).rows.expect("it has been read");
        for (row, bytes) in rows.chunks_exact(row_bytes).enumerate() {
            let Some(part) = map.row(corner, row) else { continue };
            // SAFETY: the memory outlives the launch.
            let memory = unsafe { &*self.memory };
            memory.access_aligned(who.thread, part.address, part.bytes, map.element_bytes as usize, true)?;
            let bytes = &bytes[part.skipped..][..part.bytes];
            // SAFETY: the access was just found to lie in a tensor that may be written.
            unsafe { (part.address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), part.bytes) };
        }
        Ok(())
    }

    /// Whether a thread has not waited until its stores have read shared memory.
    pub fn has_unread_stores(&self, thread: usize) -> bool {
        let unread = |groups: &StoreGroups| groups.last.is_some_and(|last| last >= groups.waited);
        self.store_groups.get(thread).is_some_and(unread)
    }
}
