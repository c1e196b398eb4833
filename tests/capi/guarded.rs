//! Structured random calls in memory between pages that nothing may touch.
//!
//! A right call of random sizes, of which up to three arguments are changed. Whatever comes of it: nothing is touched but the tensors,
//! nothing is written but outputs, and those only by a call that succeeds, and all of them then; an error names an argument that is
//! wrong.

use crate::calls::*;
use crate::fields::*;
use crate::support::*;
use half::bf16;
use pace_kernels::capi::*;
use std::collections::BTreeMap;
use std::ptr::null;

const PAGE: usize = 4096;
/// What lies around tensors, and what lies in outputs beforehand: numbers that no operator makes of those here.
const AROUND: u8 = 0xA5;
const POISON: u8 = 0xFB;

/// Pages of memory, each between two that nothing may touch. Page 0 is the struct's.
struct Pages {
    start: *mut u8,
    count: usize,
}

impl Pages {
    fn new(count: usize) -> Self {
        let bytes = (2 * count + 1) * PAGE;
        // SAFETY: new memory of its own.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        let pages = Self { start: start.cast(), count };
        for page in 0..count {
            // SAFETY: inside that memory.
            let done =
                unsafe { libc::mprotect(pages.page(page).cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE) };
            assert_eq!(done, 0);
        }
        pages
    }

    fn page(&self, page: usize) -> *mut u8 {
        assert!(page < self.count);
        self.start.wrapping_add((2 * page + 1) * PAGE)
    }

    fn bytes(&mut self, page: usize) -> &mut [u8] {
        // SAFETY: the page's memory, which no operator uses now.
        unsafe { std::slice::from_raw_parts_mut(self.page(page), PAGE) }
    }
}

/// A tensor of a call: where it lies, and what.
#[derive(Debug, Clone)]
struct Place {
    page: usize,
    len: u64,
    /// Bytes off its alignment.
    shift: usize,
    is_null: bool,
    /// Elements that are not what a right call has there.
    is_hostile: bool,
}

/// A call that is being changed.
struct Attempt<'a> {
    case: &'a Case,
    fields: &'a [Field],
    bytes: Vec<u8>,
    places: BTreeMap<&'static str, Place>,
    changed: Vec<&'static str>,
    /// Tensors are at the end of their page rather than at its start.
    at_end: bool,
}

impl<'a> Attempt<'a> {
    fn new(case: &'a Case, fields: &'a [Field], at_end: bool) -> Self {
        let bytes: Vec<u8> = case.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let is_tensor = |field: &&Field| matches!(field.kind, Kind::Tensor | Kind::Pointer);
        let place = |(i, field): (usize, &Field)| {
            let word = case.words[field.at / 8];
            let len = if field.kind == Kind::Pointer { 1 } else { case.words[field.at / 8 + 1] };
            let place = Place { page: i + 1, len, shift: 0, is_null: word == 0, is_hostile: false };
            (field.name, place)
        };
        let places = fields.iter().filter(is_tensor).enumerate().map(place).collect();
        Self { case, fields, bytes, places, changed: Vec::new(), at_end }
    }

    fn dtype(&self) -> u32 {
        u32::from_ne_bytes(self.bytes[8..12].try_into().unwrap())
    }

    fn change(&mut self, random: &mut Random, alone: bool) {
        let fields = self.fields;
        let field = &fields[random.below(fields.len() as u64) as usize];
        let at = field.at;
        let word = random.next();
        match field.kind {
            Kind::U32 => {
                let old = u32::from_ne_bytes(self.bytes[at..at + 4].try_into().unwrap());
                let new = [word as u32 % 8, old ^ 1 << (word % 32), u32::MAX, word as u32];
                let new = new[random.below(4) as usize];
                self.bytes[at..at + 4].copy_from_slice(&new.to_ne_bytes());
            }
            Kind::F32 | Kind::F64 => {
                let values = [f64::NAN, f64::INFINITY, -1.0, -0.0, 0.0, 0.5, 1.0, 1e300, 1e-300, 4e9, 1e-40];
                let new = values[random.below(values.len() as u64) as usize];
                let new = if random.below(8) == 0 { f64::from_bits(word) } else { new };
                match field.kind {
                    Kind::F32 => self.bytes[at..at + 4].copy_from_slice(&(new as f32).to_ne_bytes()),
                    _ => self.bytes[at..at + 8].copy_from_slice(&new.to_ne_bytes()),
                }
            }
            Kind::U64 | Kind::I64 => {
                let old = u64::from_ne_bytes(self.bytes[at..at + 8].try_into().unwrap());
                let known = self.case.words.len() as u64 * 8;
                let new = match field.name {
                    "size" => [0, 4, 8, known - 8, known + 4, known + 8, known + 64, 4096, 4104, word],
                    _ => [
                        0,
                        1,
                        2,
                        3,
                        old ^ 1,
                        old.wrapping_add(1),
                        old.wrapping_mul(2),
                        word,
                        u64::MAX,
                        1 << (word % 64),
                    ],
                };
                let new = new[random.below(new.len() as u64) as usize];
                self.bytes[at..at + 8].copy_from_slice(&new.to_ne_bytes());
                if field.name == "size" {
                    self.resize(new, random);
                }
            }
            Kind::Tensor | Kind::Pointer => self.change_tensor(field, random, alone),
        }
        self.changed.push(field.name);
    }

    /// The struct has as many bytes as it says, or the eight that say it.
    fn resize(&mut self, size: u64, random: &mut Random) {
        let readable = if size <= 4096 { (size as usize).next_multiple_of(8).max(8) } else { 8 };
        let cut = self.fields.iter().filter(|field| field.at + size_of::<PaceTensor>() > readable);
        self.changed.extend(cut.map(|field| field.name));
        if readable > self.bytes.len() {
            self.bytes.resize(readable, u8::from(random.below(4) == 0));
        }
    }

    fn change_tensor(&mut self, field: &Field, random: &mut Random, alone: bool) {
        let others: Vec<_> = self.places.iter().map(|(&name, place)| (name, place.page)).collect();
        let choice = random.below(8);
        let place = self.places.get_mut(field.name).unwrap();
        let (is_pointer, old) = (field.kind == Kind::Pointer, place.len);
        match choice {
            0 => (place.is_null, place.len) = (true, u64::from(is_pointer)),
            1 => place.is_null = true,
            2 => place.shift = 1 + random.below(7) as usize,
            3 | 4 if !is_pointer => {
                place.is_null = false;
                place.len = [0, 1, old + 1, old.saturating_sub(1), 2 * old][random.below(5) as usize];
                // A length that is a lie is refused because the other arguments say another; only they can tell.
                if alone && random.below(4) == 0 && field.name != "gradients" {
                    place.len =
                        [1 << 40, 1 << 61, u64::MAX, random.next() | 1 << 40][random.below(4) as usize];
                }
            }
            5 => {
                let (other, page) = others[random.below(others.len() as u64) as usize];
                (place.page, place.is_null) = (page, false);
                self.changed.push(other);
            }
            _ => place.is_hostile = true,
        }
    }

    /// Where a tensor starts, and its bytes.
    fn address(&self, pages: &Pages, name: &'static str, place: &Place) -> (*mut u8, usize) {
        if place.is_null {
            return (std::ptr::null_mut(), 0);
        }
        let bytes = (place.len as usize).checked_mul(element_size(name, self.dtype()));
        // A length that is a lie.
        let bytes = bytes.filter(|bytes| bytes.saturating_add(place.shift) <= PAGE).unwrap_or(0);
        let page = pages.page(place.page);
        let offset = if self.at_end { PAGE - bytes - place.shift } else { place.shift };
        (page.wrapping_add(offset), bytes)
    }

    /// Fills the pages, and the pointers into them.
    fn lay_out(&mut self, pages: &mut Pages, random: &mut Random) {
        let operator = OPERATORS[self.case.operator].0;
        for page in 0..pages.count {
            pages.bytes(page).fill(AROUND);
        }
        // The list comes last: another tensor on its page would change lengths to lies that nobody can tell.
        let mut places: Vec<_> = self.places.iter().collect();
        places.sort_by_key(|&(&name, _)| name == "gradients");
        for (&name, place) in places {
            let field = self.fields.iter().find(|field| field.name == name).unwrap();
            let (address, bytes) = self.address(pages, name, place);
            self.bytes[field.at..field.at + 8].copy_from_slice(&(address as u64).to_ne_bytes());
            if field.kind == Kind::Tensor {
                self.bytes[field.at + 8..field.at + 16].copy_from_slice(&place.len.to_ne_bytes());
            }
            let offset = (address as usize).wrapping_sub(pages.page(place.page) as usize);
            let list = (name == "gradients").then(|| self.gradients(pages, place, random));
            let Some(memory) = pages.bytes(place.page).get_mut(offset..offset + bytes) else { continue };
            match list {
                Some(list) => memory.copy_from_slice(&list[..bytes]),
                None if outputs(operator).contains(&(name, true)) => memory.fill(POISON),
                None => fill(memory, name, place, self.dtype(), random),
            }
        }
    }

    /// A list of tensors, the first of them on the last pages.
    fn gradients(&self, pages: &mut Pages, place: &Place, random: &mut Random) -> Vec<u8> {
        let mut list = vec![0; PAGE];
        for (i, entry) in list.chunks_exact_mut(16).take(place.len as usize).enumerate() {
            let size = element_size("", self.dtype());
            let (mut len, mut shift) = (random.below(20), 0);
            let (page, mut is_null) = (pages.count - 1 - i % 3, false);
            if place.is_hostile && random.below(2) == 0 {
                match random.below(3) {
                    0 => is_null = true,
                    1 => shift = 1,
                    _ => len = u64::MAX,
                }
            }
            let offset = PAGE - shift - if len < 20 { len as usize * size } else { 0 };
            let address = if is_null { 0 } else { pages.page(page) as u64 + offset as u64 };
            entry[..8].copy_from_slice(&address.to_ne_bytes());
            entry[8..].copy_from_slice(&len.to_ne_bytes());
            pages.bytes(page).fill(0);
        }
        list
    }

    /// Calls, and checks what came of it.
    fn run(&self, pages: &mut Pages) -> PaceStatus {
        let (operator, call, ..) = OPERATORS[self.case.operator];
        // A struct that is not the size it says is read no further than that.
        let readable = match u64::from_ne_bytes(self.bytes[..8].try_into().unwrap()) {
            size @ 8..=4096 => (size as usize).next_multiple_of(8),
            _ => 8,
        };
        let start = PAGE - readable;
        let bytes = &self.bytes[..readable.min(self.bytes.len())];
        pages.bytes(0)[start..start + bytes.len()].copy_from_slice(bytes);
        let before: Vec<Vec<u8>> = (0..pages.count).map(|page| pages.bytes(page).to_vec()).collect();
        let args = pages.page(0).wrapping_add(start);
        // SAFETY: the struct has as many bytes as it says, and every tensor is absent, refused, or memory of its length.
        let status = unsafe { call(null(), std::ptr::null_mut(), args) };
        let describe = || format!("{operator}, changed {:?}: {}, {}", self.changed, name(status), message());
        assert!(name(status) != "unknown" && status != PACE_ERROR_INTERNAL, "{}", describe());
        let mut expected = before;
        if status == PACE_OK {
            for &(output, is_overwritten) in outputs(operator) {
                let Some(place) = self.places.get(output) else { continue };
                let (address, bytes) = self.address(pages, output, place);
                let offset = (address as usize).wrapping_sub(pages.page(place.page) as usize);
                // A struct of an older version ends before what came later.
                let field = self.fields.iter().find(|field| field.name == output).unwrap();
                if bytes == 0 || field.at >= readable {
                    continue;
                }
                let written = &pages.bytes(place.page)[offset..offset + bytes];
                let size = element_size(output, self.dtype());
                let left = written.chunks(size).any(|element| element.iter().all(|&byte| byte == POISON));
                assert!(!(is_overwritten && left), "`{output}` is not written: {}", describe());
                expected[place.page][offset..offset + bytes].copy_from_slice(written);
            }
        } else {
            assert!(self.is_explained(), "{}", describe());
        }
        for (page, expected) in expected.iter().enumerate() {
            assert!(pages.bytes(page) == expected, "page {page} was written to: {}", describe());
        }
        status
    }

    /// Whether the message names an argument that is wrong.
    fn is_explained(&self) -> bool {
        let message = message();
        let mut named = message.split('`').skip(1).step_by(2).map(|name| {
            let name = name.split('[').next().unwrap().trim_end_matches("()").trim_end_matches(".len");
            name.rsplit(['.', '>']).next().unwrap()
        });
        // The first is the culprit; of two that overlap either may be.
        let count = if message.contains("overlaps") { 2 } else { 1 };
        let explains = |named: &str| {
            let named = if named == "count" { "gradients" } else { named };
            self.changed.iter().any(|changed| follows(changed, named))
        };
        named.by_ref().take(count).any(explains)
    }
}

/// Right contents of an input, or some that may be wrong.
fn fill(memory: &mut [u8], name: &str, place: &Place, dtype: u32, random: &mut Random) {
    let size = element_size(name, dtype);
    for (i, element) in memory.chunks_exact_mut(size).enumerate() {
        let hostile = place.is_hostile && random.below(4) == 0;
        let right = match name {
            "targets" | "class_weights" => 0.25,
            "mask" => 1.0,
            _ => random.below(200) as f64 / 100.0 - 1.0,
        };
        let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -1e30, 1e-310, -0.0];
        let value = if hostile { values[random.below(7) as usize] } else { right };
        match (size, name) {
            (8, "labels" | "index") => {
                let wild = [-1, i64::MAX, i64::MIN, 1 << 32, 0, 5, random.next() as i64];
                let value = if hostile { wild[random.below(7) as usize] } else { i as i64 };
                element.copy_from_slice(&value.to_ne_bytes());
            }
            (8, _) => element.copy_from_slice(&value.to_ne_bytes()),
            (4, _) => element.copy_from_slice(&(value as f32).to_ne_bytes()),
            (2, _) => element.copy_from_slice(&bf16::from_f64(value).to_ne_bytes()),
            _ => element.fill(0),
        }
    }
}

fn sizes(random: &mut Random) -> Sizes {
    let mut below = |n| 1 + random.below(n);
    let samples = below(4);
    Sizes {
        shape: PaceShape {
            branches: below(2),
            batch: below(3),
            tokens: below(3),
            in_features: below(9),
            out_features: below(9),
            shared_input: below(2) - 1,
        },
        rank: below(4),
        prompt_rank: below(4),
        samples,
        classes: samples + below(5),
        features: below(8),
    }
}

/// Calls that the variable asks for, or some.
pub fn calls() -> usize {
    let calls =
        std::env::var("PACE_FUZZ_CALLS").map(|calls| calls.parse().expect("PACE_FUZZ_CALLS is a number"));
    calls.unwrap_or(60_000)
}

/// Where calls are made.
pub struct Guarded {
    pages: Pages,
    /// Those of each operator's struct.
    fields: Vec<Vec<Field>>,
}

impl Guarded {
    /// None where pages are larger than tensors here.
    pub fn new() -> Option<Self> {
        // SAFETY: a question.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let fields = OPERATORS.iter().map(|operator| fields(operator.3)).collect();
        (page == PAGE as i64).then(|| Self { pages: Pages::new(32), fields })
    }

    /// This call with up to three changes, and what comes of it.
    fn attempt(&mut self, case: &Case, random: &mut Random) -> PaceStatus {
        let mut attempt = Attempt::new(case, &self.fields[case.operator], random.below(4) > 0);
        let changes = [0, 1, 1, 1, 2, 3][random.below(6) as usize];
        for _ in 0..changes {
            attempt.change(random, changes == 1);
        }
        attempt.lay_out(&mut self.pages, random);
        attempt.run(&mut self.pages)
    }

    /// A call of sizes and changes of the fuzzer's choice.
    #[allow(dead_code, reason = "evidence/fuzz calls it")]
    pub fn led(&mut self, arena: &mut Arena, random: &mut Random) -> PaceStatus {
        let cases = cases(arena, sizes(random));
        let case = &cases[random.below(cases.len() as u64) as usize];
        self.attempt(case, random)
    }
}

#[test]
fn fuzz_between_guard_pages() {
    let Some(mut guarded) = Guarded::new() else {
        println!("skipped: pages are not of {PAGE} bytes, which tensors of this test fit");
        return;
    };
    let mut random = Random::new(std::env::var("PACE_FUZZ_SEED").map_or(1, |seed| seed.parse().unwrap()));
    let (mut seen, mut done) = (BTreeMap::<PaceStatus, usize>::new(), 0);
    let mut arena = Arena::new(160);
    while done < calls() {
        for case in cases(&mut arena, sizes(&mut random)) {
            for _ in 0..100 {
                *seen.entry(guarded.attempt(&case, &mut random)).or_default() += 1;
                done += 1;
            }
        }
    }
    println!("{done} calls: {:?}", seen.iter().map(|(&status, n)| (name(status), n)).collect::<Vec<_>>());
    assert!(seen.len() >= 9, "{seen:?}");
}
