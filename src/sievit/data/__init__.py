"""Images, COCO annotations, augmentation and generated scenes."""
