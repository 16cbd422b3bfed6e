"""Training and evaluation: visible loops on Lightning Fabric."""
