// Puts the colours that were chosen on the page before it is first painted; hence no module, which would come later.
document.documentElement.dataset.theme = localStorage.getItem("ringlm.theme") ?? "";
