//! A store that is made smaller before anything lies in it.

use super::*;

#[test]
fn an_unused_store_can_be_made_smaller_and_hands_out_what_is_left() {
    let mut store = BlockStore::new(8, TOKENS, ChainHasher::new([7; 32])).with_host_blocks(3);
    store.shrink(2);
    assert_eq!((store.total(), store.free(), store.host_blocks()), (2, 2, 3));
    assert_eq!([store.allocate(), store.allocate(), store.allocate()], [Some(BlockId(0)), Some(BlockId(1)), None]);
}

#[test]
#[should_panic(expected = "blocks are in use")]
fn a_store_with_a_block_in_use_keeps_its_size() {
    let mut store = BlockStore::new(8, TOKENS, ChainHasher::new([7; 32]));
    let _ = store.allocate();
    store.shrink(2);
}
