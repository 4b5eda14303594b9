"use strict";
// Without this script the page shows the slices that it opens at, and no controls.
document.documentElement.classList.add("js");

for (const slider of document.querySelectorAll(".plane input[type=range]")) {
  const plane = slider.closest(".plane");
  const tile = plane.querySelector(".tile");
  const said = plane.querySelector("output");
  const slices = slider.dataset.slices.split(",");
  const columns = Number(tile.style.getPropertyValue("--columns"));
  const show = () => {
    const number = Number(slider.value);
    tile.style.setProperty("--column", number % columns);
    tile.style.setProperty("--row", Math.floor(number / columns));
    const text = `slice ${slices[number]} of ${slider.dataset.of}`;
    said.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", show);
  show();
}

// Only what scrolls sideways needs to be reached by the keyboard.
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const region of document.querySelectorAll(".scroll")) sized.observe(region);

for (const box of document.querySelectorAll("input[data-layer]")) {
  const images = box.closest(".case").querySelectorAll(`img[data-layer="${box.dataset.layer}"]`);
  const show = () => {
    for (const image of images) image.hidden = !box.checked;
  };
  box.addEventListener("change", show);
  show();
}
