"""The context block of mmsegmentation's GCHead, alone; the rest of the segmenter is left."""

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.porting.families import mmcv_context
from gcnet_jax.porting.families.rules import BOOKKEEPING, Family

FAMILY = Family(
    'mmsegmentation',
    GlobalContext,
    mmcv_context.rules,
    recognise=(r'(decode_head\.gc_block\.)?channel_(add|mul)_conv\.0\.weight',),
    network=None,
    context='gc_block',
    prefix='decode_head.gc_block.',
    left=BOOKKEEPING
    | {
        r'backbone\..*': "the segmenter's backbone",
        r'decode_head\.(?!gc_block\.).*': 'the rest of its head',
        r'(auxiliary_head|neck|data_preprocessor)\..*': 'other parts of the segmenter',
    },
)
