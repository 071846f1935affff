//! The one source of real randomness; everything else is seeded from it or from a test.

/// 16 bytes for a secret.
pub fn secret() -> [u8; 16] {
    let mut bytes = [0; 16];
    // The kernel's generator does not fail for so few bytes once the machine is up.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
