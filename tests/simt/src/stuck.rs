//! Why nothing can go on.

use crate::engine::Engine;
use crate::fault::{Fault, Waiting};
use crate::hooks::{Context, Place, WARP, Wait};
use crate::machine::State;

/// What a thread in this state does instead of joining the others.
pub fn otherwise(state: State) -> String {
    match state {
        State::Runnable => "runs".into(),
        State::Done => "has returned".into(),
        State::Waits(Wait::Barrier(place)) => format!("waits at the barrier in {place}"),
        State::Waits(Wait::Exchange(place, mask)) => format!("waits at {place} for lanes {mask:#010x}"),
        State::Waits(Wait::Collective(place, _)) => {
            format!("waits at {place} for another operation of the whole warp")
        }
        State::Waits(Wait::Warpgroup(place, _)) => format!("waits at {place} for its warpgroup"),
        State::Waits(Wait::Named(place, id, threads)) => {
            format!("waits at named barrier {id} of {threads} threads in {place}")
        }
        State::Waits(Wait::Cluster(place)) => format!("waits at the barrier of the cluster in {place}"),
        State::Waits(Wait::Mbarrier(place, address)) => {
            format!("waits for the mbarrier at {address:#x} in {place}")
        }
    }
}

/// The fault of threads none of which can run; some have not returned.
pub fn explain(states: &[State], contexts: &[Context], engine: &Engine) -> Fault {
    let is = |kind: fn(&Wait) -> bool| {
        states.iter().position(|state| matches!(state, State::Waits(wait) if kind(wait)))
    };
    if is(|wait| matches!(wait, Wait::Mbarrier(..))).is_some() {
        return hang(states, engine);
    }
    // A warp that is stuck explains a barrier that is not reached, not the other way round.
    let warp = is(|wait| matches!(wait, Wait::Exchange(..) | Wait::Collective(..)));
    if let Some((first, State::Waits(wait))) = warp.map(|first| (first, states[first])) {
        let (place, mask) = match wait {
            Wait::Exchange(place, mask) => (place, mask),
            Wait::Collective(place, _) => (place, u32::MAX),
            _ => return hang(states, engine),
        };
        return warp_divergence(states, contexts, first, place, mask);
    }
    let others = |wait: &Wait| matches!(wait, Wait::Warpgroup(..) | Wait::Named(..) | Wait::Cluster(..));
    let Some(first) = is(|wait| matches!(wait, Wait::Barrier(_))).filter(|_| is(others).is_none()) else {
        return hang(states, engine);
    };
    let State::Waits(Wait::Barrier(place)) = states[first] else { return hang(states, engine) };
    let block = first / engine.per_block * engine.per_block;
    let other = (block..block + engine.per_block).find(|&i| states[i] != states[first]);
    match other {
        Some(other) => Fault::BarrierDivergence {
            waiting: contexts[first].thread(),
            place: place.to_string(),
            other: contexts[other].thread(),
            otherwise: otherwise(states[other]),
        },
        None => hang(states, engine),
    }
}

fn warp_divergence(states: &[State], contexts: &[Context], first: usize, place: Place, mask: u32) -> Fault {
    let lanes = first / WARP * WARP..states.len().min(first / WARP * WARP + WARP);
    let mut missing = lanes.filter(|i| mask >> (i % WARP) & 1 == 1 && states[*i] != states[first]);
    let running = missing.clone().find(|&i| states[i] != State::Done);
    let other = running.or_else(|| missing.next()).unwrap_or(first);
    Fault::WarpDivergence {
        waiting: contexts[first].thread(),
        place: place.to_string(),
        mask,
        other: contexts[other].thread(),
        otherwise: otherwise(states[other]),
    }
}

/// Who waits where.
fn hang(states: &[State], engine: &Engine) -> Fault {
    let mut groups: Vec<(usize, State, Waiting)> = Vec::new();
    for (i, &state) in states.iter().enumerate().filter(|(_, state)| **state != State::Done) {
        let block = i / engine.per_block;
        if let Some((.., waiting)) = groups.iter_mut().find(|group| (group.0, group.1) == (block, state)) {
            waiting.threads += 1;
            continue;
        }
        let barrier = match state {
            State::Waits(Wait::Mbarrier(_, address)) => engine.barrier_state(block, address),
            _ => None,
        };
        let waiting = Waiting { first: engine.thread(i), threads: 1, what: otherwise(state), barrier };
        groups.push((block, state, waiting));
    }
    let (mbarriers, others): (Vec<_>, Vec<_>) =
        groups.into_iter().map(|group| group.2).partition(|waiting| waiting.barrier.is_some());
    Fault::Hang(mbarriers.into_iter().chain(others).collect())
}
