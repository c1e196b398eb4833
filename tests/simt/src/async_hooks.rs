//! What kernels call for tensor cores, copies and barriers that work asynchronously: `pace_simt_*` of sm90.h.

use crate::engine::WARPGROUP;
use crate::hooks::{Place, WARP, Wait, WarpgroupOperation, current};
use std::ffi::{c_char, c_void};

#[unsafe(no_mangle)]
extern "C" fn pace_simt_cluster_rank() -> u32 {
    current().ask(|_, block| Ok(block as u32))
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_elect(file: *const c_char, line: u32) -> bool {
    let context = current();
    context.wait(Wait::Exchange(Place { file, line }, u32::MAX));
    context.index_in_block() % WARP as u32 == context.elected
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_shared_at(
    file: *const c_char,
    line: u32,
    address: u32,
    bytes: u32,
    is_write: bool,
) -> *mut c_void {
    let context = current();
    let who = context.at(Place { file, line });
    context.ask(|engine, block| {
        let host = engine.shared_at(block, who, address, bytes as usize, is_write)?;
        if is_write {
            engine.note_write(block, who.index, address, bytes);
        }
        Ok(host.cast())
    })
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_named_barrier(file: *const c_char, line: u32, id: u32, threads: u32) {
    let (context, place) = (current(), Place { file, line });
    let is_possible = |per_block| {
        (1..16).contains(&id) && threads.is_multiple_of(WARP as u32) && (1..=per_block).contains(&threads)
    };
    context.ask(|engine, _| match is_possible(engine.per_block as u32) {
        true => Ok(()),
        false => Err(context.at(place).instruction(format!("named barrier {id} of {threads} threads"))),
    });
    context.wait(Wait::Named(place, id as u16, threads as u16));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_cluster_barrier(file: *const c_char, line: u32) {
    current().wait(Wait::Cluster(Place { file, line }));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_barrier_init(file: *const c_char, line: u32, barrier: u32, arrivals: u32) {
    let context = current();
    let who = context.at(Place { file, line });
    context.ask(|engine, block| engine.barrier_init(block, who, barrier, arrivals));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_fence_barriers() {
    let context = current();
    context.ask(|engine, block| {
        engine.fence_barriers(block, context.index);
        Ok(())
    });
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_barrier_arrive(file: *const c_char, line: u32, barrier: u32, bytes: u32) {
    let context = current();
    let who = context.at(Place { file, line });
    context.ask(|engine, block| engine.barrier_arrive(block, who, barrier, bytes, false));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_barrier_arrive_at(file: *const c_char, line: u32, barrier: u32, rank: u32) {
    let context = current();
    let who = context.at(Place { file, line });
    context.ask(|engine, block| match rank as usize {
        rank if rank < engine.blocks.len() => engine.barrier_arrive(rank, who, barrier, 0, rank != block),
        rank => Err(who.instruction(format!("arrives at block {rank} of its cluster"))),
    });
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_barrier_wait(file: *const c_char, line: u32, barrier: u32, parity: u32) {
    let (context, place) = (current(), Place { file, line });
    let who = context.at(place);
    // Another phase may have completed by the time that the thread runs: then it waits again, as on a device.
    while !context.ask(|engine, block| engine.barrier_test(block, who, barrier, parity)) {
        context.wait(Wait::Mbarrier(place, barrier));
    }
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_fence_async_proxy() {
    let context = current();
    context.ask(|engine, block| {
        engine.fence_async_proxy(block, context.index);
        Ok(())
    });
}

/// Copies to the blocks in `ranks`; none of them: to the thread's own.
#[unsafe(no_mangle)]
extern "C" fn pace_simt_copy_box(
    file: *const c_char,
    line: u32,
    ranks: u32,
    to: u32,
    map: *const c_void,
    barrier: u32,
    corner: *const [i32; 3],
) {
    let context = current();
    let who = context.at(Place { file, line });
    // SAFETY: sm90.h passes three numbers.
    let corner = unsafe { *corner };
    let ranks = (ranks != 0).then_some(ranks);
    context.ask(|engine, _| engine.copy_box(who, ranks, to, map as usize, barrier, corner));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_store_box(
    file: *const c_char,
    line: u32,
    map: *const c_void,
    from: u32,
    corner: *const [i32; 3],
) {
    let context = current();
    let who = context.at(Place { file, line });
    // SAFETY: sm90.h passes three numbers.
    let corner = unsafe { *corner };
    context.ask(|engine, _| engine.store_box(who, map as usize, from, corner));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_commit_stores() {
    let context = current();
    context.ask(|engine, _| {
        engine.commit_stores(context.index);
        Ok(())
    });
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_wait_for_stores(pending: u32, reads_only: bool) {
    let context = current();
    context.ask(|engine, _| engine.wait_for_stores(context.index, pending as usize, reads_only));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_prefetch_map(file: *const c_char, line: u32, map: *const c_void) {
    let context = current();
    let who = context.at(Place { file, line });
    context.ask(|engine, _| engine.tensor_map(who, map as usize).map(|_| ()));
}

/// Waits for all threads of the warpgroup; the scheduler then does it.
fn together(place: Place, operation: WarpgroupOperation) {
    let context = current();
    context.ask(|engine, _| match engine.per_block.is_multiple_of(WARPGROUP) {
        true => Ok(()),
        false => Err(context
            .at(place)
            .instruction("a warpgroup's instruction in a block that ends with a part of one")),
    });
    context.wait(Wait::Warpgroup(place, operation));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_set_registers(file: *const c_char, line: u32, count: u32) {
    let place = Place { file, line };
    if !(24..=256).contains(&count) || !count.is_multiple_of(8) {
        let context = current();
        context.fail(context.at(place).instruction(format!("setmaxnreg to {count} registers")));
    }
    together(place, WarpgroupOperation::SetRegisters(count));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_wgmma_fence(file: *const c_char, line: u32) {
    together(Place { file, line }, WarpgroupOperation::Fence);
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_wgmma_commit(file: *const c_char, line: u32) {
    together(Place { file, line }, WarpgroupOperation::Commit);
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_wgmma_wait(file: *const c_char, line: u32, pending: u32) {
    together(Place { file, line }, WarpgroupOperation::Wait(pending));
}

/// `operands`: [`crate::wgmma::Operands`].
#[unsafe(no_mangle)]
extern "C" fn pace_simt_wgmma(file: *const c_char, line: u32, operands: *mut c_void) {
    current().operands.set(operands);
    together(Place { file, line }, WarpgroupOperation::Wgmma);
}
