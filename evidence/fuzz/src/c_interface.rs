//! Calls of the C interface between pages that nothing may touch: those of `tests/capi/guarded.rs`, with operators, sizes and changes
//! of the fuzzer's choice.

#![no_main]
// The tests use all of it.
#![allow(dead_code, unused_imports)]

#[path = "../../../tests/capi/calls.rs"]
mod calls;
#[path = "../../../tests/capi/fields.rs"]
mod fields;
#[path = "../../../tests/capi/guarded.rs"]
mod guarded;
#[path = "../../../tests/capi/support.rs"]
mod support;

use std::cell::RefCell;

thread_local! {
    static STATE: RefCell<(guarded::Guarded, calls::Arena)> =
        RefCell::new((guarded::Guarded::new().expect("pages are as small as tensors need"), calls::Arena::new(160)));
}

libfuzzer_sys::fuzz_target!(|choices: &[u8]| {
    STATE.with_borrow_mut(|(guarded, arena)| {
        // Contents of tensors are not worth a choice.
        guarded.led(arena, &mut support::Random::led_by(&choices[..choices.len().min(128)], 1));
    });
});
