//! Machine code of compute capability 9.0 as `cuobjdump -sass` prints it: instructions, where control goes from them, and the
//! registers that they touch. What is not known is taken for more than it is, so that nothing is overlooked.

use std::ops::Range;

/// A set of registers, R0 to R254.
#[derive(Default, Clone, Copy, PartialEq, Debug)]
pub struct Registers([u64; 4]);

impl Registers {
    pub fn add(&mut self, registers: Range<usize>) {
        registers
            .filter(|&register| register < 255)
            .for_each(|register| self.0[register / 64] |= 1 << (register % 64));
    }

    pub fn meets(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }
}

impl From<Range<usize>> for Registers {
    fn from(registers: Range<usize>) -> Self {
        let mut set = Self::default();
        set.add(registers);
        set
    }
}

/// Opcodes whose operands outside brackets are one register each, in the order of the alphabet.
const NARROW: &[&str] = &[
    "BAR",
    "BMSK",
    "BREV",
    "ELECT",
    "F2FP",
    "FADD",
    "FCHK",
    "FFMA",
    "FLO",
    "FMNMX",
    "FMUL",
    "FSEL",
    "FSET",
    "FSETP",
    "FSWZADD",
    "HADD2",
    "HFMA2",
    "HMNMX2",
    "HMUL2",
    "HSET2",
    "HSETP2",
    "I2FP",
    "IABS",
    "IADD",
    "IADD3",
    "IDP",
    "IMAD",
    "IMNMX",
    "IMUL",
    "ISETP",
    "LEA",
    "LOP3",
    "MATCH",
    "MOV",
    "MOVM",
    "MUFU",
    "NANOSLEEP",
    "P2R",
    "PLOP3",
    "POPC",
    "PRMT",
    "R2P",
    "R2UR",
    "REDUX",
    "S2R",
    "SEL",
    "SGXT",
    "SHF",
    "SHFL",
    "VABSDIFF",
    "VABSDIFF4",
    "VIADD",
    "VIADDMNMX",
    "VIMNMX",
    "VOTE",
    "WARPSYNC",
];
/// The same unless a modifier says that there are 64 bits.
const CONVERSIONS: &[&str] = &["F2F", "F2I", "FRND", "I2F", "I2I"];
/// Opcodes that access memory; a modifier says how wide.
const MEMORY: &[&str] = &[
    "ATOM", "ATOMG", "ATOMS", "LD", "LDC", "LDG", "LDGSTS", "LDL", "LDS", "LDSM", "RED", "REDG", "ST",
    "STAS", "STG", "STL", "STS", "STSM", "SYNCS",
];
/// Opcodes whose addresses are one register: they are in shared or local memory, or their `.64` is printed.
const SHORT_ADDRESSES: &[&str] =
    &["ARRIVES", "ATOMS", "LDC", "LDGSTS", "LDL", "LDS", "LDSM", "STAS", "STL", "STS", "STSM", "SYNCS"];
/// Opcodes whose first register operand is not written.
const NO_DESTINATION: &[&str] = &[
    "BAR",
    "BRX",
    "CALL",
    "DSETP",
    "FCHK",
    "FSETP",
    "HSETP2",
    "ISETP",
    "JMX",
    "NANOSLEEP",
    "PLOP3",
    "RET",
    "WARPSYNC",
];

/// A wgmma.
#[derive(Clone, PartialEq, Debug)]
pub struct Wgmma {
    pub accumulators: Range<usize>,
    /// The left operand, if it is in registers.
    pub a: Option<Range<usize>>,
    /// Whether it is the last one of its group.
    pub commits: bool,
}

#[derive(Clone, Debug)]
pub struct Instruction {
    pub address: u32,
    /// Whether it is executed depends on a predicate.
    pub guarded: bool,
    pub opcode: String,
    operands: Vec<String>,
}

impl Instruction {
    /// Reads a line, `/*0410*/  @!P0 BRA 0x2d80 ;  /* encoding */`. `None`: there is no instruction in it.
    pub fn read(line: &str) -> Option<Self> {
        let (address, rest) = line.trim().strip_prefix("/*")?.split_once("*/")?;
        let (text, _) = rest.split_once(';')?;
        let text = text.trim();
        let (guarded, text) = match text.strip_prefix('@') {
            Some(guarded) => (true, guarded.split_once(' ')?.1.trim()),
            None => (false, text),
        };
        let (opcode, operands) = text.split_once(' ').unwrap_or((text, ""));
        let operands = operands.split(',').map(|operand| operand.trim().to_owned());
        Some(Self {
            address: u32::from_str_radix(address, 16).ok()?,
            guarded,
            opcode: opcode.to_owned(),
            operands: operands.filter(|operand| !operand.is_empty()).collect(),
        })
    }

    /// As it is printed, without the predicate.
    pub fn text(&self) -> String {
        format!("{:#06x} {} {}", self.address, self.opcode, self.operands.join(", "))
    }

    /// The opcode without its modifiers.
    pub fn base(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    pub fn has(&self, modifier: &str) -> bool {
        self.opcode.split('.').skip(1).any(|part| part == modifier)
    }

    /// The wgmma that it is. An error: it is one that is not understood.
    pub fn wgmma(&self) -> Result<Option<Wgmma>, String> {
        if !self.base().ends_with("GMMA") {
            return Ok(None);
        }
        let error = || format!("{} is not understood", self.text());
        let mut modifiers = self.opcode.split('.').skip(1);
        let shape = modifiers.next().ok_or_else(error)?;
        let n: usize = shape.split('x').nth(1).and_then(|n| n.parse().ok()).ok_or_else(error)?;
        let count = if modifiers.next() == Some("F16") { n / 4 } else { n / 2 };
        let mut operands = self.operands.iter();
        let d = operands.next().ok_or_else(error)?;
        let first = register(d).ok_or_else(error)?;
        let mut operand = operands.next().ok_or_else(error)?;
        let a = register(operand).map(|a| a..a + 4);
        if a.is_some() {
            operand = operands.next().ok_or_else(error)?;
        }
        let c = operands.next().ok_or_else(error)?;
        if !operand.starts_with("gdesc[") || !(c == d || c == "RZ") {
            return Err(error());
        }
        let commits = self.operands.iter().any(|operand| operand == "gsb0");
        Ok(Some(Wgmma { accumulators: first..first + count, a, commits }))
    }

    /// If it waits for groups of wgmmas: how many may stay in flight. An error: it has to do with wgmmas, but how is not known.
    pub fn waits_for(&self) -> Result<Option<usize>, String> {
        let count = match &*self.opcode {
            "WARPGROUP.DEPBAR.LE" => match &self.operands[..] {
                [group, count] if group == "gsb0" => number(count).map(|count| count as usize),
                _ => None,
            },
            "WARPGROUP.ARRIVE" => return Ok(None),
            _ if self.base() != "WARPGROUP" && self.operands.iter().all(|operand| operand != "gsb0") => {
                return Ok(None);
            }
            _ => None,
        };
        count.map(Some).ok_or_else(|| format!("{} is not understood", self.text()))
    }

    /// Registers that it writes, and all that it touches.
    pub fn registers(&self) -> (Registers, Registers) {
        let mut written = Registers::default();
        let mut touched = Registers::default();
        let operands: Vec<&str> =
            self.operands.iter().map(|operand| &**operand).filter(|operand| !is_predicate(operand)).collect();
        for (index, operand) in operands.iter().enumerate() {
            for (first, width) in self.registers_of(operand, index, index + 1 == operands.len()) {
                touched.add(first..first + width);
            }
        }
        if let Some(first) = operands.first().and_then(|operand| register(operand))
            && !NO_DESTINATION.contains(&self.base())
        {
            written.add(first..first + self.width(0, operands.len() == 1));
        }
        (written, touched)
    }

    /// The first register and the number of registers of each in an operand: `-R4.reuse`, `desc[UR8][R12.64+0x10]`.
    fn registers_of(&self, operand: &str, index: usize, is_last: bool) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        let mut depth = 0;
        let mut before = ' ';
        for (at, letter) in operand.char_indices() {
            match letter {
                '[' => depth += 1,
                ']' => depth -= 1,
                'R' if !before.is_ascii_alphanumeric() && before != '_' => {
                    if let Some(first) = register(&operand[at..]) {
                        let suffix = operand[at + 1..].trim_start_matches(|c: char| c.is_ascii_digit());
                        let width = match depth {
                            0 => self.width(index, is_last),
                            _ if suffix.starts_with(".64") => 2,
                            _ if suffix.starts_with(".U32") || SHORT_ADDRESSES.contains(&self.base()) => 1,
                            _ => 2,
                        };
                        found.push((first, width));
                    }
                }
                _ => {}
            }
            before = letter;
        }
        found
    }

    /// How many registers an operand outside brackets has; predicates do not count as operands.
    fn width(&self, index: usize, is_last: bool) -> usize {
        let base = self.base();
        let wide = self.has("WIDE") && (index == 0 || is_last) || self.has("HI") && base == "IMAD" && is_last;
        match base {
            "LDSM" | "STSM" if self.has("4") => 4,
            "LDSM" | "STSM" if self.has("2") => 2,
            "CS2R" if !self.has("32") => 2,
            "CS2R" => 1,
            // The state of a barrier.
            "SYNCS" if index == 0 => 2,
            _ if MEMORY.contains(&base) => {
                if self.has("128") {
                    4
                } else if self.has("64") {
                    2
                } else {
                    1
                }
            }
            _ if CONVERSIONS.contains(&base) => {
                1 + usize::from(["F64", "S64", "U64"].iter().any(|m| self.has(m)))
            }
            _ if NARROW.contains(&base) => 1 + usize::from(wide),
            // As many as a matrix operand has, or 128 bits.
            _ => 4,
        }
    }
}

/// The register that a text begins with, maybe behind a sign.
fn register(text: &str) -> Option<usize> {
    let digits = text.trim_start_matches(['-', '~', '!', '|']).strip_prefix('R')?;
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

fn is_predicate(operand: &str) -> bool {
    let name = operand.trim_start_matches('!').trim_start_matches('U');
    name.strip_prefix('P').is_some_and(|rest| rest == "T" || rest.parse::<u8>().is_ok())
}

fn number(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// For each instruction the ones that may follow it.
pub fn successors(code: &[Instruction]) -> Result<Vec<Vec<usize>>, String> {
    let index_of = |address| code.binary_search_by_key(&address, |instruction| instruction.address);
    // The address among the operands, if there is one.
    let target = |instruction: &Instruction| match instruction.operands.last().and_then(|last| number(last)) {
        Some(address) => match index_of(address) {
            Ok(index) => Ok(Some(index)),
            Err(_) => Err(format!("{} leaves the code", instruction.text())),
        },
        None => Ok(None),
    };
    // Where control may go on that left at an instruction of another kind.
    let mut after_calls = Vec::new();
    let mut collectives = Vec::new();
    let mut barriers: Vec<(&str, usize)> = Vec::new();
    for (index, instruction) in code.iter().enumerate() {
        match (instruction.base(), target(instruction)) {
            ("CALL", _) => after_calls.push(index + 1),
            ("WARPSYNC", Ok(Some(target))) => collectives.push(target),
            ("BSSY", Ok(Some(target))) => barriers.push((&instruction.operands[0], target)),
            _ => {}
        }
    }
    let anywhere: Vec<usize> = (0..code.len()).collect();
    let mut successors = Vec::new();
    for (index, instruction) in code.iter().enumerate() {
        let mut next = match instruction.base() {
            "EXIT" | "KILL" => Vec::new(),
            "BRA" | "JMP" | "CALL" => match target(instruction)? {
                Some(target) => vec![target],
                None => anywhere.clone(),
            },
            "BRX" | "BRXU" | "JMX" | "JMXU" => anywhere.clone(),
            "RET" => after_calls.clone(),
            "BSYNC" => {
                let same = barriers.iter().filter(|(name, _)| *name == instruction.operands[0]);
                same.map(|&(_, target)| target).chain([index + 1]).collect()
            }
            "ENDCOLLECTIVE" => collectives.iter().copied().chain([index + 1]).collect(),
            // `WARPSYNC 0xffffffff` has a mask.
            "WARPSYNC" if instruction.has("COLLECTIVE") => {
                target(instruction)?.into_iter().chain([index + 1]).collect()
            }
            _ => vec![index + 1],
        };
        // Modifiers and further operands of a branch are conditions.
        let conditional =
            instruction.base() == "BRA" && (instruction.opcode != "BRA" || instruction.operands.len() > 1);
        if instruction.guarded || conditional {
            next.push(index + 1);
        }
        next.retain(|&index| index < code.len());
        next.sort_unstable();
        next.dedup();
        successors.push(next);
    }
    Ok(successors)
}
