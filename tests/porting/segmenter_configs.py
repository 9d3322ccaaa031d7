"""mmsegmentation's configurations of GCNet's segmenters, `configs/gcnet`, and the networks here."""

CONFIGS = {
    f'gcnet_r{depth}-d8_{config}': f'gc_resnet{depth}_d8_{row}'
    for depth in (50, 101)
    for config, row in (
        ('4xb2-40k_cityscapes-512x1024', 'cityscapes'),
        ('4xb2-80k_cityscapes-512x1024', 'cityscapes'),
        ('4xb2-40k_cityscapes-769x769', 'cityscapes_769'),
        ('4xb2-80k_cityscapes-769x769', 'cityscapes_769'),
        ('4xb4-80k_ade20k-512x512', 'ade20k'),
        ('4xb4-160k_ade20k-512x512', 'ade20k'),
        ('4xb4-20k_voc12aug-512x512', 'voc'),
        ('4xb4-40k_voc12aug-512x512', 'voc'),
    )
}
